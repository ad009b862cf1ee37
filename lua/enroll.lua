#!lua flags=allow-oom
-- enroll: name a namespace among those of the server, as used now by the server's clock.
--
-- KEYS[1]    dp:namespaces
-- ARGV[1]    the namespace
-- returns    1 when it is new, else 0
-- flags      allow-oom: who makes room has to find every namespace
-- cost       a TIME and a ZADD
-- @include clock
return redis.call('ZADD', KEYS[1], ('%.0f'):format(now), ARGV[1])

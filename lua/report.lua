#!lua flags=allow-oom
-- report: keep what a holder reports of itself, with the server's time, so that readers see how old it is.
--
-- KEYS[1]    dp:{<ns>}:metrics, holder to time and report
-- ARGV[1]    the holder
-- ARGV[2]    the report, msgpack
-- returns    the server's time in ms
-- flags      allow-oom: a fleet on a full server has to be seen
-- cost       TIME, HSET
-- @include clock
redis.call('HSET', KEYS[1], ARGV[1], ('%.0f:'):format(now) .. ARGV[2])
return ('%.0f'):format(now)

#!lua flags=allow-oom
-- turn: let one process at a time do something, also on a server that is full.
--
-- KEYS[1]    a key that is there while a process has the turn
-- ARGV[1]    how long the turn lasts, ms
-- returns    1 when the caller has it now, else 0
-- flags      allow-oom: it takes no room to speak of
-- cost       a SET
return redis.call('SET', KEYS[1], '1', 'NX', 'PX', ARGV[1]) and 1 or 0

#!lua flags=allow-oom
-- register: give a worker an epoch that it never had; all that it published under an older one counts for nothing.
--
-- KEYS[1]    dp:{<ns>}:epochs, worker to epoch
-- ARGV[1]    the worker's id
-- ARGV[2]    an epoch that the new one must be above: the worker's own, after data were lost or older ones restored
-- returns    the new epoch
-- flags      allow-oom: a worker may join a server that is full
-- cost       HGET, HSET
local worker, above = ARGV[1], tonumber(ARGV[2])
local epoch = math.max(tonumber(redis.call('HGET', KEYS[1], worker) or '0'), above) + 1
redis.call('HSET', KEYS[1], worker, epoch)
return epoch

-- Every reply says of which history it is: the shard's generation, how many of the caller's writes it had before the
-- call, and how many it has now. A caller that was acknowledged more, or another generation, knows that some are lost.
local function answer(reply)
  local has = written
  if written > 0 then
    has = redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
  elseif written == 0 and ARGV[1] ~= schema then
    local member = ARGV[1]:match('^%S+ %d+ (.*)$')
    local before = redis.call('HGET', writers, member)
    if before then
      redis.call('HDEL', KEYS[1], before)
    end
    redis.call('HSET', writers, member, ARGV[1])
    has = redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
  end
  return { reply, generation or '', written, has }
end

-- Every reply says of which history it is: the shard's generation, how many of the caller's writes it had before the
-- call, and how many it has now. A caller that was acknowledged more, or another generation, knows that some are lost.
-- Then how many damaged places were passed over, if any.
local is_noted = false -- by `settle`, in the command that writes the shard's counts

local function answer(reply)
  local has = written
  if written >= 0 and ARGV[1] ~= schema then
    has = written + 1
    if written == 0 then
      local member, writers = ARGV[1]:match('^%S+ %d+ (.*)$'), KEYS[1]:sub(1, -5) .. 'writers'
      local name = redis.call('HGET', writers, member)
      if name and name ~= ARGV[1] then
        redis.call('HDEL', KEYS[1], name)
      end
      redis.call('HSET', writers, member, ARGV[1])
    end
    if not is_noted then
      redis.call('HSET', KEYS[1], ARGV[1], has)
    end
  end
  return { reply, generation or '', written, has, damaged > 0 and damaged or nil }
end

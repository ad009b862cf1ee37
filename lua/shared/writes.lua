-- Every reply says of which history it is: the shard's generation, how many of the caller's writes it had before the
-- call, and how many it has now. A caller that was acknowledged more, or another generation, knows that some are lost.
local function answer(reply)
  local has = written
  if caller ~= '' and written >= 0 then
    has = written + 1
    redis.call('HSET', writers, caller, caller_epoch .. ':' .. has)
  end
  return { reply, generation or '', written, has }
end

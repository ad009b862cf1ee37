-- Every reply says of which history it is: the shard's generation, and how many of the caller's writes it has, this one
-- included. A caller that was acknowledged more, or another generation, knows that history was lost.
local function answer(reply)
  return { reply, generation or '', caller == '' and written or redis.call('HINCRBY', writers, caller, 1) }
end

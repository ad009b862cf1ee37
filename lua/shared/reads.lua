-- Every reply says of which history it is: the shard's generation, how many of the caller's writes it had before the
-- call, and how many it has now. A caller that was acknowledged more, or another generation, knows that some are lost.
local function answer(reply)
  return { reply, generation or '', written, written }
end

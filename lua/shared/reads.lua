-- Every reply says of which history it is: the shard's generation, how many of the caller's writes it had before the
-- call, and how many it has now. A caller that was acknowledged more, or another generation, knows that some are lost.
-- Then how many damaged places were passed over, if any.
local function answer(reply)
  return { reply, generation or '', written, written, damaged > 0 and damaged or nil }
end

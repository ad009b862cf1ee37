-- Every reply says of which history it is: the shard's generation, and how many of the caller's writes it has. A caller
-- that was acknowledged more, or another generation, knows that history was lost.
local function answer(reply)
  return { reply, generation or '', written }
end

-- How many of the children a holder covers, of the junction that is named by the chunk `parent`.
local function covered_children(parent, holder)
  return count_of(redis.pcall('HGET', counts_key(parent), holder))
end

-- How many chunks a leaf has to give up, from its end on, so that so many chunks and bytes go; or all that it has.
local function surplus(size, sizes, chunks, bytes)
  local cut = 0
  while cut < size and (chunks > 0 or bytes > 0) do
    cut = cut + 1
    chunks, bytes = chunks - 1, bytes - 16 - size_at(sizes, size - cut)
  end
  return cut
end

-- Names of keys. All are derived from the one declared key, the shard's meta hash, and so lie in its slot.
local base = KEYS[1]:sub(1, -5) -- "dp:{<ns>:<shard>}:meta" without "meta"

-- A hash in hex: of chunk `at` of a packed run, or of the last. Four numbers take half the time of sixteen bytes.
local function hex(packed, at)
  local first = at and at * 16 + 1 or #packed - 15
  local a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p = packed:byte(first, first + 15)
  return ('%08x%08x%08x%08x'):format(a * 16777216 + b * 65536 + c * 256 + d, e * 16777216 + f * 65536 + g * 256 + h,
    i * 16777216 + j * 65536 + k * 256 + l, m * 16777216 + n * 65536 + o * 256 + p)
end

local function node_key(head)
  return base .. 'n:' .. head
end

-- A junction is named by the last chunk of its owner's run. The heads of the tree hang from the junction "root".
local function junction_key(last)
  return base .. 'j:' .. (last == '' and 'root' or last)
end

-- Whether a junction's field names a child; the others are its owner, and holders, whose names all contain "@".
local function is_child(field)
  return field ~= 'o' and not field:find('@', 1, true)
end

-- Chunks [first, last) of a packed run, 16 bytes each.
local function slice(packed, first, last)
  return packed:sub(first * 16 + 1, last * 16)
end

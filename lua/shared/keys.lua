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

-- Whether a junction's field names a child: the head of a node. The others are its owner, and holders.
local function is_child(field)
  return #field == 32 and not field:find('[^0-9a-f]')
end

-- A stored number that is at least 0; `otherwise`, or 0, for what is none: no value may end a script that has written.
local function count_of(value, otherwise)
  local number = tonumber(value or '')
  return number and number >= 0 and number < 9007199254740992 and number or otherwise or 0
end

-- Whether a node's run can be one: at most 256 chunks, and the first of them is what the node is named by.
local function is_run(head, run)
  return run and #run > 0 and #run % 16 == 0 and #run <= 4096 and hex(run, 0) == head
end

-- Chunks [first, last) of a packed run, 16 bytes each.
local function slice(packed, first, last)
  return packed:sub(first * 16 + 1, last * 16)
end

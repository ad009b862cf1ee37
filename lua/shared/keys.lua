-- Names of keys. All are derived from the one declared key, the shard's meta hash, and so lie in its slot.
local base = KEYS[1]:sub(1, -5) -- "dp:{<ns>:<shard>}:meta" without "meta"
local hash_format = ('%02x'):rep(16)

local function hex(hash)
  return hash_format:format(hash:byte(1, 16))
end

local function node_key(head)
  return base .. 'n:' .. head
end

-- A junction is named by the last chunk of its owner's run. The heads of the tree hang from the junction "root".
local function junction_key(last)
  return base .. 'j:' .. (last == '' and 'root' or last)
end

-- Chunks [first, last) of a packed run, 16 bytes each.
local function slice(packed, first, last)
  return packed:sub(first * 16 + 1, last * 16)
end

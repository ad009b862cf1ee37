-- Payloads: the bytes of a chunk are in kv:<chunk> (warm) or cold:<chunk>: a header of 40 bytes, and at most 8 MiB
-- with it. The rest of a longer one is in kv:<chunk>:<upload>:1 and so on, where the upload is in the header: parts of
-- one upload belong together and to no other. The columns "b:@warm" and "b:@cold" have the size of each payload, header
-- and all parts together, 4 bytes a chunk, little endian; 0 for a chunk that is in the other tier.
local part, header_bytes, tiers = 8388608, 40, { ['@warm'] = 'kv:', ['@cold'] = 'cold:' }

-- Size of the payload of chunk `at`, 0 behind the end.
local function size_at(sizes, at)
  local a, b, c, d = sizes:byte(at * 4 + 1, at * 4 + 4)
  return d and a + b * 256 + c * 65536 + d * 16777216 or 0
end

-- What the payloads from chunk `from` on take together; no call has more than 4,352 chunks.
local function sum_of(sizes, from)
  local sum = 0
  for at = from or 0, math.min(#sizes / 4, 4352) - 1 do
    sum = sum + size_at(sizes, at)
  end
  return sum
end

-- Length of a value; 0 for one that is not there, or is no string.
local function length_of(key)
  local length = redis.pcall('STRLEN', key)
  return type(length) == 'number' and length or 0
end

-- All keys of a payload and their lengths, as the header in the first value names them; that one is always among them.
local function values_of(tier, chunk)
  local first = base .. tiers[tier] .. chunk
  local keys, lengths = { first }, { length_of(first) }
  if lengths[1] == part then
    local header = redis.call('GETRANGE', first, 0, header_bytes - 1)
    local upload, total = '', math.min(header_bytes + size_at(header, 4), 64 * part + header_bytes)
    for at = 21, 28 do
      upload = upload .. ('%02x'):format(header:byte(at))
    end
    for number = 1, math.ceil(total / part) - 1 do
      keys[number + 1] = first .. ':' .. upload .. ':' .. number
      lengths[number + 1] = length_of(keys[number + 1])
      if lengths[number + 1] ~= math.min(part, total - number * part) then
        lengths[1] = 0 -- a part is missing: nothing of it counts
      end
    end
  end
  return keys, lengths
end

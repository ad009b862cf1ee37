-- Size of a payload that is there as a whole, else 0; and its keys.
local function whole_size(tier, chunk)
  local keys, lengths = values_of(tier, chunk)
  local size = lengths[1]
  for number = 2, size > 0 and #keys or 0 do
    size = size + lengths[number]
  end
  return size, keys
end

-- A size as the columns of payloads have it.
local function packed_size(size)
  local low, high = size % 65536, math.floor(size / 65536)
  return string.char(low % 256, math.floor(low / 256), high % 256, math.floor(high / 256) % 256)
end

-- The sizes of a chain's first chunks that a node has warm, at most so many and without a gap.
local function stored_before(chain, most)
  local run, sizes = unpack(most > 0 and redis.call('HMGET', node_key(hex(chain, 0)), 'r', 'b:@warm') or {})
  local count = math.min(most, #(run or '') / 16, #(sizes or '') / 4)
  if count == 0 or slice(run, 0, count) ~= slice(chain, 0, count) then
    return ''
  end
  for at = 0, count - 1 do
    if size_at(sizes, at) == 0 then
      return sizes:sub(1, at * 4)
    end
  end
  return sizes:sub(1, count * 4)
end

-- Keeps what was written for a run's chunks, as far as it is there as a whole: it would have expired. Returns the
-- sizes. With the sizes that are `expected` nothing else is kept, and nothing at all if there is anything else.
local function keep_all(tier, run, expected)
  local sizes, keys = {}, {}
  for at = 0, #run / 16 - 1 do
    local size, found = whole_size(tier, hex(run, at))
    if size == 0 then
      break
    end
    for _, key in ipairs(found) do
      keys[#keys + 1] = key
    end
    sizes[at + 1] = packed_size(size)
  end
  sizes = table.concat(sizes)
  for i = 1, (expected or sizes) == sizes and #keys or 0 do
    redis.call('PERSIST', keys[i])
  end
  return sizes
end

-- Payloads: the bytes of a chunk lie in kv:<chunk> (warm) or cold:<chunk>, in parts of 8 MiB, the others in
-- kv:<chunk>:1 and so on. The columns "b:@warm" and "b:@cold" have the size of each, header and all parts together,
-- 4 bytes a chunk, little endian; 0 for a chunk that lies in the other tier.
local part, tiers = 8388608, { ['@warm'] = 'kv:', ['@cold'] = 'cold:' }

local function payload_key(tier, chunk, number)
  return base .. tiers[tier] .. chunk .. (number > 0 and ':' .. number or '')
end

-- Size of the payload of chunk `at`, 0 behind the end.
local function size_at(sizes, at)
  local a, b, c, d = sizes:byte(at * 4 + 1, at * 4 + 4)
  return d and a + b * 256 + c * 65536 + d * 16777216 or 0
end

-- What the payloads from chunk `from` on take together.
local function sum_of(sizes, from)
  local sum = 0
  for at = from or 0, #sizes / 4 - 1 do
    sum = sum + size_at(sizes, at)
  end
  return sum
end

-- The payloads of a run's chunks from `from` on go. Cold ones on another server are named in `trash`: somebody who
-- can reach it has to delete them.
local function release(tier, run, sizes, from)
  local keys, elsewhere = {}, tier == '@cold' and #sizes > 0 and redis.call('HGET', KEYS[1], 'elsewhere') == '1'
  for at = from, #sizes / 4 - 1 do
    local chunk, size = hex(run, at), size_at(sizes, at)
    for number = 0, elsewhere and size > 0 and 0 or math.ceil(size / part) - 1 do
      keys[#keys + 1] = elsewhere and chunk or payload_key(tier, chunk, number)
    end
  end
  for i = 1, #keys, 1000 do
    local last = math.min(i + 999, #keys)
    if elsewhere then
      redis.call('SADD', base .. 'trash', unpack(keys, i, last))
      redis.call('SREM', base .. 'kept', unpack(keys, i, last))
    else
      redis.call('UNLINK', unpack(keys, i, last))
    end
  end
end

-- All payloads of a node from chunk `from` on go.
local function release_all(node, from)
  for tier in pairs(tiers) do
    release(tier, node.r or '', node['b:' .. tier] or '', from)
  end
end

-- Keeps what was written for a run's chunks, as far as it is there: it would have gone by itself. Returns the sizes.
-- With the sizes that are `expected` nothing else is kept, and nothing at all if there is anything else.
local function keep_all(tier, run, expected)
  local sizes, keys = {}, {}
  for at = 0, #run / 16 - 1 do
    local chunk, number, size, length = hex(run, at), 0, 0, part
    while length == part do
      keys[#keys + 1] = payload_key(tier, chunk, number)
      length = redis.call('STRLEN', keys[#keys])
      size, number = size + length, number + 1
    end
    if size == 0 then
      break
    end
    local low, high = size % 65536, math.floor(size / 65536)
    sizes[at + 1] = string.char(low % 256, math.floor(low / 256), high % 256, math.floor(high / 256) % 256)
  end
  sizes = table.concat(sizes)
  for i = 1, (expected or sizes) == sizes and #keys or 0 do
    redis.call('PERSIST', keys[i])
  end
  return sizes
end

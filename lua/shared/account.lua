-- What the shard holds, added up while a script runs and written once by `settle`. Bytes are an estimate of what Redis
-- takes, by what was measured: a node, a chunk, a holder's coverage, whatever columns and metadata there are; warm
-- payloads count as they are, and once more in `warm`. Cold ones count in `cold` alone.
local added = { nodes = 0, chunks = 0, bytes = 0, warm = 0, cold = 0 }

local function account(nodes, chunks, holders, extra, warm, cold)
  added.nodes, added.chunks = added.nodes + nodes, added.chunks + chunks
  added.bytes = added.bytes + 700 * nodes + 16 * chunks + 70 * holders + extra + (warm or 0)
  added.warm, added.cold = added.warm + (warm or 0), added.cold + (cold or 0)
end

-- How many holders a node's fields (name, value, ...) name, the bytes of its columns and metadata, and those of its
-- payloads, warm and cold.
local function weigh(fields)
  local holders, extra, warm, cold = 0, 0, 0, 0
  for i = 1, #fields, 2 do
    local kind = fields[i]:sub(1, 2)
    if kind == 'h:' then
      holders = holders + 1
    elseif kind == 'b:' or kind == 'e:' or kind == 'm' then
      extra = extra + #fields[i + 1]
      warm = warm + (fields[i] == 'b:@warm' and sum_of(fields[i + 1]) or 0)
      cold = cold + (fields[i] == 'b:@cold' and sum_of(fields[i + 1]) or 0)
    end
  end
  return holders, extra, warm, cold
end

-- Writes the counts, and that the caller wrote. Returns nodes, chunks and bytes in the shard, and its leaves.
local function settle()
  local total, names = {}, { 'nodes', 'chunks', 'bytes', 'warm', 'cold' }
  for i, name in ipairs(names) do
    total[i] = count_of(shard[i]) + added[name]
    total[i + 5] = ('%.0f'):format(total[i])
  end
  is_noted = written >= 0 and ARGV[1] ~= schema
  redis.call('HSET', KEYS[1], 'nodes', total[6], 'chunks', total[7], 'bytes', total[8], 'warm', total[9],
    'cold', total[10], unpack(is_noted and { ARGV[1], written + 1 } or {}))
  return { total[1], total[2], total[3], redis.call('ZCARD', base .. 'leaves') }
end

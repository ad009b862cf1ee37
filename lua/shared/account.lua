-- What the shard holds, added up while a script runs and written once by `settle`. Bytes are an estimate of what Redis
-- takes, by what was measured: a node, a chunk, a holder's coverage, and whatever block ids and metadata there are.
local added = { nodes = 0, chunks = 0, bytes = 0 }

local function account(nodes, chunks, holders, extra)
  added.nodes, added.chunks = added.nodes + nodes, added.chunks + chunks
  added.bytes = added.bytes + 700 * nodes + 16 * chunks + 70 * holders + extra
end

-- How many holders a node's fields (name, value, ...) name, and the bytes of its columns and metadata.
local function weigh(fields)
  local holders, extra = 0, 0
  for i = 1, #fields, 2 do
    local kind = fields[i]:sub(1, 2)
    if kind == 'h:' then
      holders = holders + 1
    elseif kind == 'b:' or kind == 'e:' or kind == 'm' then
      extra = extra + #fields[i + 1]
    end
  end
  return holders, extra
end

-- Writes the counts. Returns nodes, chunks and bytes in the shard, and its leaves.
local function settle()
  return {
    redis.call('HINCRBY', KEYS[1], 'nodes', added.nodes), redis.call('HINCRBY', KEYS[1], 'chunks', added.chunks),
    redis.call('HINCRBY', KEYS[1], 'bytes', added.bytes), redis.call('ZCARD', base .. 'leaves'),
  }
end

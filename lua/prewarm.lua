#!lua flags=no-writes
-- prewarm: the hottest nodes with all that lies above them, parents first, each once a call.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    rank of the candidate to begin with, 0 for the hottest
-- ARGV[3]    chunks after which the call ends
-- returns    {rank to go on with or -1, then each node as walk tells it, with its place and run before:
--             parent, depth, run, size, matched, accessed, hits, created, metadata, "", holders, (holder, epoch:k)...}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       an HGETALL a node and an HGET a step up
-- @include guard
-- @include reads
-- @include keys
-- @include walk
local rank, budget = tonumber(ARGV[2]), tonumber(ARGV[3])
local reply, sent, chunks = { -1 }, {}, 0

-- A candidate's path, deepest first, up to what was sent already; nil when the way up is broken.
local function path_of(head)
  local path = {}
  while not sent[head] do
    local parent, depth = unpack(redis.call('HMGET', node_key(head), 'p', 'd'))
    if not parent then
      return nil
    end
    path[#path + 1] = { head = head, parent = parent, depth = depth }
    head = redis.call('HGET', junction_key(parent), 'o')
    if parent == '' or not head then
      return parent == '' and path or nil
    end
  end
  return path
end

while chunks < budget do
  local head = redis.call('ZREVRANGE', base .. 'hot', rank, rank)[1]
  if not head then
    return answer(reply)
  end
  local path = path_of(head) or {}
  for i = #path, 1, -1 do
    local run, n = redis.call('HGET', node_key(path[i].head), 'r'), #reply
    if not run then
      break
    end
    reply[n + 1], reply[n + 2], reply[n + 3] = path[i].parent, path[i].depth, run
    walk(run, '', reply)
    sent[path[i].head], chunks = true, chunks + #run / 16
  end
  rank = rank + 1
end
reply[1] = rank
return answer(reply)

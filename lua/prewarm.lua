#!lua flags=no-writes
-- prewarm: the hottest nodes with all that lies above them, parents first, each once a call. A long path comes in
-- several calls, the lower part of it first.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2]    rank of the candidate to begin with, 0 for the hottest
-- ARGV[3]    chunks after which the call ends; it ends with its budget as well
-- ARGV[4]    "", or the head of a node on the path of that candidate, to go on with upwards
-- returns    {rank to go on with or -1, head to go on with or "", then each node as walk tells it, with its place and
--            run before:
--             parent, depth, run, size, matched, accessed, hits, created, metadata, "", holders, (holder, epoch:k)...}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       an HGETALL a node and an HGET a step up, at most about 60 nodes
-- @include guard
-- @include keys
-- @include budget
-- @include walk
local rank, budget, above = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local reply, sent, chunks = { -1, '' }, {}, 0

-- The path of a node, deepest first, up to what was sent already; nil when the way up is broken. Where the budget ends
-- before the path does, also the head to go on with.
local function path_of(head)
  local path = {}
  while not sent[head] do
    if is_spent() and #path > 0 then
      return path, head
    end
    local parent, depth = unpack(redis.call('HMGET', node_key(head), 'p', 'd'))
    if not parent then
      return nil
    end
    spend(2 + redis.call('HLEN', node_key(head)) / 12)
    path[#path + 1] = { head = head, parent = parent, depth = depth }
    head = redis.call('HGET', junction_key(parent), 'o')
    if parent == '' or not head then
      return parent == '' and path or nil
    end
  end
  return path
end

while chunks < budget and not is_spent() do
  local head = above ~= '' and above or redis.call('ZREVRANGE', base .. 'hot', rank, rank)[1]
  if not head then
    return reply
  end
  spend(1)
  local path, rest = path_of(head)
  path, above = path or {}, rest or ''
  for i = #path, 1, -1 do
    local run, n = redis.call('HGET', node_key(path[i].head), 'r'), #reply
    if not run then
      break
    end
    reply[n + 1], reply[n + 2], reply[n + 3] = path[i].parent, path[i].depth, run
    walk(run, '', reply)
    sent[path[i].head], chunks = true, chunks + #run / 16
  end
  rank = rank + (rest and 0 or 1)
end
reply[1], reply[2] = rank, above
return reply

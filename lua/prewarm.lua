#!lua flags=no-writes
-- prewarm: nodes with all that precedes them, parents first, each once a call. A long path comes in several calls, the
-- lower part of it first.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    chunks after which the call ends; it ends with its budget as well
-- ARGV[3..]  heads of the nodes, in hex
-- returns    {heads that are done, head to go on with upwards in place of the last of these or "", then each node as
--            walk tells it, with its place and run before:
--             parent, depth, run, size, matched, accessed, hits, created, metadata, "", holders, (holder, epoch:k)...}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       an HGETALL a node and an HGET a step up, at most about 50 nodes
-- @include guard
-- @include reads
-- @include keys
-- @include budget
-- @include walk
-- @include upwards
local budget, reply, sent, chunks = tonumber(ARGV[2]), { 0, '' }, {}, 0

-- The path of a node, deepest first, up to what was sent already; nil when the way up is broken. Where the budget ends
-- before the path does, also the head to go on with.
local function path_of(head)
  local path, below = {}, nil
  while not sent[head] do
    if is_spent() and #path > 0 then
      return path, head
    end
    local parent, depth, run = unpack(redis.pcall('HMGET', node_key(head), 'p', 'd', 'r'))
    if not run or not is_sound(head, run, depth, parent, below) then
      return nil
    end
    spend(3.5 + redis.call('HLEN', node_key(head)) / 12)
    path[#path + 1] = { head = head, parent = parent, depth = depth, run = run }
    below = count_of(depth)
    if parent == '' then
      return path
    end
    head = redis.call('HGET', junction_key(parent), 'o')
    if not head then
      return nil
    end
  end
  return path
end

for at = 3, #ARGV do
  if chunks >= budget or is_spent() then
    break
  end
  spend(0.2)
  local path, above = path_of(ARGV[at])
  path = path or {}
  for i = #path, 1, -1 do
    local n, run = #reply, path[i].run
    reply[n + 1], reply[n + 2], reply[n + 3] = path[i].parent, path[i].depth, run
    walk(run, '', reply)
    sent[path[i].head], chunks = true, chunks + #run / 16
  end
  reply[1], reply[2] = at - 2, above or ''
end
return answer(reply)

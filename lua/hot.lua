#!lua flags=no-writes
-- hot: the candidates for pre-warming with the most hits.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    rank of the first, 0 for the hottest
-- ARGV[3]    how many, at most
-- returns    {hash of the last chunk, depth behind it, hits, accessed, created, head, ... for each}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       a ZREVRANGE, and an HMGET a node
-- @include guard
-- @include reads
-- @include budget
-- @include keys
local reply, rank, most = {}, tonumber(ARGV[2]), tonumber(ARGV[3])

local function add(head)
  local run, depth, hits, accessed, created = unpack(redis.pcall('HMGET', node_key(head), 'r', 'd', 'n', 'a', 'c'))
  if is_run(head, run) and count_of(depth, -1) >= 0 then
    local n = #reply
    reply[n + 1], reply[n + 2], reply[n + 3] = hex(run), depth + #run / 16, count_of(hits)
    reply[n + 4], reply[n + 5], reply[n + 6] = count_of(accessed), count_of(created), head
  elseif run then
    damaged = damaged + 1
  end
end

repeat -- what is no node makes room for others
  local portion = redis.call('ZREVRANGE', base .. 'hot', rank, rank + most - 1)
  for _, head in ipairs(portion) do
    add(head)
  end
  rank = rank + #portion
  spend(10 + #portion / 5)
until #portion < most or #reply > 0 or is_spent()
return answer(reply)

#!lua flags=no-writes
-- census: who covers which nodes, a part of the tree a call; of some holders all that is needed to go on. The caller
-- keeps what is left to read, a stack of items, and calls until it is empty.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    units of work to do in this call
-- ARGV[3]    items, the next one last, with spaces between them: "root" or "<head>" to begin with; "<last>:<cursor>"
--            children of a junction yet to be read
-- ARGV[4..]  holders whose nodes, chunks and keys are wanted; none for all nodes and holders, without chunks and keys
-- returns    {{item left, ...}, {head, parent, depth, holder, "epoch:k", chunks, keys, holder, ...} for each node}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       an HGETALL or HMGET a node, a share of an HSCAN and an HMGET a child where a holder is counted
-- @include guard
-- @include reads
-- @include budget
-- @include keys
-- @include tally
-- @include children
local items, reply, holders = {}, { {} }, #ARGV > 3 and { unpack(ARGV, 4) } or nil
allow(tonumber(ARGV[2]))
for item in ARGV[3]:gmatch('%S+') do
  items[#items + 1] = item
end

-- A node's run, what is told of it without holders, and holder, "epoch:k", keys, ...
local function read_node(head)
  local run, parent, depth = unpack(redis.pcall('HMGET', node_key(head), 'r', 'p', 'd'))
  local held = {}
  if holders then
    for _, holder in ipairs(holders) do
      local covered, keys = unpack(redis.call('HMGET', node_key(head), 'h:' .. holder, 'e:' .. holder))
      if covered then
        held[#held + 1] = { holder, covered, slice(run or '', 0, tonumber(covered:match('%d+$')) or 0), keys or '' }
        spend(#held[#held][3] / 16384)
      end
    end
  else
    local flat = redis.pcall('HGETALL', node_key(head))
    for i = 1, #flat, 2 do
      if flat[i]:sub(1, 2) == 'h:' then
        held[#held + 1] = { flat[i]:sub(3), flat[i + 1], '', '' }
      end
    end
    spend(#flat / 50)
  end
  return run, { head, parent or '', depth or '0' }, held
end

repeat
  spend(2)
  local head, cursor = table.remove(items):match('^(%w+):?(.*)$')
  local last = head
  if cursor == '' and head ~= 'root' then
    local run, told, held = read_node(head)
    for _, each in ipairs(run and held or {}) do
      for i = 1, 4 do
        told[#told + 1] = each[i]
      end
    end
    reply[#reply + 1] = run and told or nil
    last = is_run(head, run) and hex(run) or nil
    damaged = damaged + (run and not last and 1 or 0)
  end
  if last then
    local children, after = children_of(last, cursor == '' and '0' or cursor, holders, cursor == '' and head or '')
    items[#items + 1] = after ~= '0' and last .. ':' .. after or nil
    for _, child in ipairs(children) do
      items[#items + 1] = child
    end
  end
until #items == 0 or is_spent()
reply[1] = items
return answer(reply)

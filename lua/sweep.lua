#!lua flags=allow-oom
-- sweep: take away coverage of nodes that counts for nothing, and tell what lies behind them; what nobody covers goes.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    heads of nodes, in hex, with spaces between them; "root" for what lies above all
-- ARGV[3..]  member, epoch, ...: coverage of the member under an older epoch goes
-- returns    {chunks of coverage taken away, nodes removed, chunks removed, head of a child, ...}
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it only makes room
-- cost       an HGETALL and an HKEYS a node, and its change
-- @include guard
-- @include writes
-- @include keys
-- @include policies
-- @include score
-- @include payload
-- @include release
-- @include account
-- @include tell
-- @include fields
-- @include discard
-- @include unlink
-- @include uncover
local newest, reply, taken, nodes, chunks = {}, { 0, 0, 0 }, 0, 0, 0
for i = 3, #ARGV, 2 do
  newest[ARGV[i]] = tonumber(ARGV[i + 1])
end
redis.call('XLEN', base .. 'log')
redis.call('ZCARD', base .. 'hot')
-- Whether a node's fields make sense. One that another hand wrote is passed over: look-ups refuse it as well.
local function is_sound(flat, node)
  local sound = node.r and #node.r > 0 and #node.r % 16 == 0
  for i = 1, #flat, 2 do
    if flat[i]:sub(1, 2) == 'h:' then
      local epoch, covered = flat[i + 1]:match('^(%d+):(%d+)$')
      sound = sound and epoch and tonumber(covered) > 0
    end
  end
  return sound
end

-- Takes from a node what counts for nothing. A leaf that nobody covers goes, one that nobody covers to its end is cut.
local function clean(head)
  local flat, node = fields_of(head)
  if not is_sound(flat, node) then
    return
  end
  for i = 1, #flat, 2 do
    local holder = flat[i]:match('^h:(.*)$')
    if holder and tonumber(flat[i + 1]:match('^%d+')) < (newest[holder:match('^[^@]*')] or 0) then
      local lost, gone, cut = uncover(head, node.r, holder, 0, true)
      taken, nodes, chunks = taken + lost, nodes + gone, chunks + cut
    end
  end
  flat, node = fields_of(head)
  if node.r and redis.call('HLEN', junction_key(hex(node.r))) == 0 then
    local longest = longest_coverage(flat) -- a child that went after what covered this node had kept the rest of it
    if longest == 0 then
      nodes, chunks = nodes + 1, chunks + unlink(head, flat, node)
    elseif longest < #node.r / 16 then
      chunks = chunks + shorten(head, longest, flat, node)
    end
  end
end

for head in ARGV[2]:gmatch('%w+') do
  local run = head ~= 'root' and redis.call('HGET', node_key(head), 'r')
  for _, child in ipairs((run or head == 'root') and redis.call('HKEYS', junction_key(run and hex(run) or '')) or {}) do
    reply[#reply + 1] = child ~= 'o' and child or nil
  end
  while run and head do
    local above, before = redis.call('HGET', junction_key(redis.call('HGET', node_key(head), 'p') or ''), 'o'), nodes
    clean(head)
    head = nodes > before and above -- what lost its last child is looked at again
  end
end
settle()
reply[1], reply[2], reply[3] = taken, nodes, chunks
return answer(reply)

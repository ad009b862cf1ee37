#!lua flags=allow-oom
-- sweep: take away coverage that counts for nothing, deepest first, where junctions name the holders it is of; what
-- nobody covers is removed. The caller keeps what is left to do, a stack of items, and calls until it is empty.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    units of work to do in this call
-- ARGV[3]    items, the next one last, with spaces between them: "root" or "<head>" to begin with; "<last>:<cursor>"
--            children of a junction yet to be read; "<head>/" below which all is done, "<head>/!" for the second time
-- ARGV[4..]  holder, epoch, ...: coverage of the holder under an older epoch is removed; at most 100 holders
-- returns    {chunks of coverage taken away, nodes removed, chunks removed, item left, ...}
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it only makes room
-- cost       an HMGET and a share of an HSCAN for each child where a holder is counted; an HGETALL and its change for a
--            node that a holder covers
-- @include guard
-- @include writes
-- @include budget
-- @include keys
-- @include tally
-- @include covered
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
-- @include children
-- @include clean
local newest, holders, items, reply = {}, {}, {}, { 0, 0, 0 }
for i = 4, #ARGV, 2 do
  newest[ARGV[i]], holders[#holders + 1] = tonumber(ARGV[i + 1]), ARGV[i]
end
allow(tonumber(ARGV[2]))
redis.call('XLEN', base .. 'log')
redis.call('ZCARD', base .. 'hot')
for item in ARGV[3]:gmatch('%S+') do
  items[#items + 1] = item
end

local function read_on(last, cursor, owner)
  local children, after = children_of(last, cursor, holders, owner)
  items[#items + 1] = after ~= '0' and last .. ':' .. after or nil
  for _, child in ipairs(children) do
    items[#items + 1] = child
  end
end

repeat
  local item = table.remove(items)
  local head, kind, rest = item:match('^(%w+)([:/]?)(.*)$')
  if kind == ':' then
    read_on(head, rest, '')
  elseif head == 'root' then
    read_on(head, '0', '')
  else
    local last, stale = look_at(head, holders, newest)
    local is_leaf = not last or redis.pcall('HLEN', junction_key(last)) == 0
    if last and not is_leaf and (kind == '' or (rest == '' and is_counted(last, stale))) then
      items[#items + 1] = head .. (kind == '' and '/' or '/!')
      read_on(last, '0', head)
    elseif last and (#stale > 0 or (is_leaf and kind ~= '')) then
      clean(head, stale, reply)
    end
  end
until #items == 0 or is_spent()
settle()
for _, item in ipairs(items) do
  reply[#reply + 1] = item
end
return answer(reply)

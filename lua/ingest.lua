#!lua
-- ingest: write what an engine's events changed, and with it up to which message that is: both or neither.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the most chunks a run may have
-- ARGV[3]    the stream: the member whose coverage changes, <worker>/<rank>
-- ARGV[4]    number of the caller's right to write, as stream told it, and how often the stream was written, as the
--            caller knows: a server that lost some of that is found out
-- ARGV[5]    epoch of the member
-- ARGV[6]    the last message that the changes come from, "" to write none: written once all changes are
-- ARGV[7]    its digest
-- ARGV[8]    when the engine made it
-- ARGV[9]    what the caller needs to go on from here
-- ARGV[10..] changes, 4 arguments each: medium; depth of the chain's first chunk, or "" when its last chunk is lost;
--            chain, from a node's head; the engine's keys, as many bytes for each chunk, or for a chunk that is lost
--            what to resume with, as "again" told it before, else ""
-- returns    {"heads" and the chunks that nodes begin with | "part", chunks published, those that nodes begin with |
--             "done" | "again" and what to resume with | "absent" | "noparent" | "refused" for each change looked at}
-- errors     DPGONE, DPSCHEMA, DPFENCED, DPLOST; DPNOPARENT, DPSTALE, DPDAMAGED, DPAGAIN of a change become words
-- flags      none (writes; a server that is out of memory refuses it before anything has changed)
-- cost       what insert and trim cost, for each change
-- @include guard
-- @include writes
-- @include budget
-- @include keys
-- @include tally
-- @include covered
-- @include clock
-- @include walk
-- @include path
-- @include policies
-- @include score
-- @include payload
-- @include release
-- @include account
-- @include tell
-- @include fields
-- @include discard
-- @include edit
-- @include cover
-- @include create
-- @include hindrance
-- @include publish
-- @include unlink
-- @include uncover
-- @include climb
-- @include descend
-- @include withdraw
-- @include change
local max_run, member, epoch = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[5])
local key, reply, complete = base .. 's:' .. member, {}, true
local number, writes = ARGV[4]:match('^(%d+) (%d+)$')
local right, has = unpack(redis.call('HMGET', key, 'f', 'n'))
if right ~= number then
  return redis.error_reply('DPFENCED another ingester writes what ' .. member .. ' says')
elseif (has or '0') ~= writes then
  return redis.error_reply('DPLOST ' .. member .. ' was written ' .. (writes or '?') .. ' times, not ' .. (has or '0'))
end

local words = { DPNOPARENT = 'noparent', DPAGAIN = 'again' }
for i = 10, #ARGV, 4 do
  if is_spent() then
    break
  end
  local well, word = pcall(change, member, epoch, max_run, unpack(ARGV, i, i + 3))
  word = not well and 'refused' or words[word:match('^DP%u+')] or word:match('^DP%u+') and 'refused' or word
  local is_done = word == 'done' or word == 'refused' or word:match('^heads')
  complete = complete and is_done
  reply[#reply + 1] = word
end
settle()
redis.call('HINCRBY', key, 'n', 1)
if complete and #reply * 4 == #ARGV - 9 and ARGV[6] ~= '' then
  redis.call('HSET', key, 'q', ARGV[6], 'x', ARGV[7], 't', ARGV[8], 'p', epoch, 'g', ARGV[9])
end
return answer(reply)

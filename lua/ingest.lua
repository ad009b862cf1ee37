#!lua
-- ingest: write what an engine's events changed, and with it up to which message that is: both or neither.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    schema version the caller speaks
-- ARGV[2]    the most chunks a run may have
-- ARGV[3]    the stream: the member whose coverage changes, <worker>/<rank>
-- ARGV[4]    number of the caller's right to write, as stream told it
-- ARGV[5]    epoch of the member
-- ARGV[6]    the last message that the changes come from, "" to write none: written once all changes are
-- ARGV[7]    its digest
-- ARGV[8]    when the engine made it
-- ARGV[9]    what the caller needs to go on from here
-- ARGV[10..] changes, 4 arguments each: medium; depth of the chain's first chunk, or "" when its last chunk is lost;
--            chain, from a node's head; the engine's keys, as many bytes for each chunk
-- returns    {"heads" and the chunks that nodes begin with | "done" | "again", told as far as time allowed | "absent" |
--             "noparent" | "refused" for each change that was looked at}
-- errors     DPGONE, DPSCHEMA, DPFENCED; for one change DPNOPARENT, DPSTALE and DPDAMAGED become words of the reply
-- flags      none (writes; a server that is out of memory refuses it before anything has changed)
-- cost       what insert and trim cost, for each change
-- @include guard
-- @include keys
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
-- @include create
-- @include repeats
-- @include publish
-- @include unlink
-- @include uncover
-- @include withdraw
local max_run, member, number, epoch = tonumber(ARGV[2]), ARGV[3], ARGV[4], tonumber(ARGV[5])
local key, reply, complete, budget = base .. 's:' .. member, {}, true, 500
if redis.call('HGET', key, 'f') ~= number then
  return redis.error_reply('DPFENCED another ingester writes what ' .. member .. ' says')
end

-- What became of one change: a word, and chunks.
local function change(medium, depth, chain, keys)
  local holder = member .. '@' .. medium
  if depth == '' then
    local taken, nodes, _, word = withdraw(chain, holder, epoch, budget)
    budget = taken and math.max(1, budget - nodes) or budget
    return taken and word or nodes.err
  end
  local done, problem = publish(chain, tonumber(depth), '', {
    now = ('%.0f'):format(now), max_run = max_run, holder = holder, epoch = epoch,
    column = 'e:', width = #keys * 16 / #chain, ids = keys,
  })
  return done and 'heads ' .. table.concat(done.starts, ' ') or problem.err
end

for i = 10, #ARGV, 4 do
  local well, word = pcall(change, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
  word = well and (word:match('^DPNOPARENT') and 'noparent' or word:match('^DP%u+') and 'refused' or word) or 'refused'
  complete = complete and word ~= 'again' and word ~= 'noparent' and word ~= 'absent'
  reply[#reply + 1] = word
end
settle()
if complete and ARGV[6] ~= '' then
  redis.call('HSET', key, 'q', ARGV[6], 'x', ARGV[7], 't', ARGV[8], 'p', epoch, 'g', ARGV[9])
end
return reply

#!lua flags=no-writes
-- feed: what the log says since an entry that the caller has, that entry included: if it is missing, more is.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; the log is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    id of the last entry that the caller has; "" to begin: the newest entry alone
-- ARGV[3]    the most entries to read
-- returns    {when the shard was made, number of the newest entry, id, {field, value, ...}, id, {...}, ...}
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       an HMGET, and an XRANGE of as many entries
-- @include guard
-- @include reads
-- @include keys
local last, most, log = ARGV[2], tonumber(ARGV[3]), base .. 'log'
local created, number = unpack(redis.call('HMGET', KEYS[1], 'created', 'log'))
local entries
if last == '' then
  entries = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)
else
  entries = redis.call('XRANGE', log, last, '+', 'COUNT', most)
end
local reply = { created or '', number or '0' }
for _, entry in ipairs(entries) do
  reply[#reply + 1], reply[#reply + 2] = entry[1], entry[2]
end
return answer(reply)

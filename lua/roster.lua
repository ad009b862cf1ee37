#!lua flags=no-writes
-- roster: whose epoch or lease changed since a version, and when leases end: a page of each a call, in the order in
-- which they change, so that what changes between two pages is told with the second.
--
-- KEYS[1]    dp:{<ns>}:epochs; the other keys of the workers are derived from it and share its slot
-- ARGV[1]    version of which the caller knows all changes, "" for none
-- ARGV[2]    end of a lease in ms: leases that end then or later are told, those that end first first; "" for none
-- ARGV[3]    leases to leave out, of those that end at that very time or later
-- ARGV[4]    the most members to tell of in each of the two
-- ARGV[5]    a member whose epoch is told in any case, or ""
-- returns    {now in ms of the server's clock, version, epoch of that member or "", version to go on from, 1 when these
--            are changes since the beginning because the caller's version is unknown here, else 0, {member, epoch, end
--            of its lease or "", ...}, {member, end of its lease, ...}}, or the first three of these when nothing has
--            changed and no leases are asked for
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       a GET and an HGET; two ZRANGE, an HMGET and a ZMSCORE when something has changed
-- @include clock
local roster, most, own = KEYS[1]:sub(1, -7), tonumber(ARGV[4]), ARGV[5]
local stored = tonumber(redis.pcall('GET', roster .. 'version') or '') or 0
local version = stored >= 0 and stored < 9e15 and stored or 0
local known = tonumber(ARGV[1]) or -1
local reply = { ('%.0f'):format(now), ('%.0f'):format(version), redis.call('HGET', KEYS[1], own) or '' }
if known == version and ARGV[2] == '' then
  return reply
end
local is_unknown = known > version or known < 0
local after = is_unknown and '-inf' or ('(%.0f'):format(known)
local changed = redis.call('ZRANGE', roster .. 'changes', after, '+inf', 'BYSCORE', 'LIMIT', 0, most, 'WITHSCORES')
local members, told, leases = {}, {}, {}
for i = 1, #changed, 2 do
  members[#members + 1] = changed[i]
end
if #members > 0 then
  local epochs = redis.call('HMGET', KEYS[1], unpack(members))
  local ends = redis.call('ZMSCORE', roster .. 'workers', unpack(members))
  for i, member in ipairs(members) do
    told[3 * i - 2], told[3 * i - 1], told[3 * i] = member, epochs[i] or '', ends[i] or ''
  end
end
if ARGV[2] ~= '' then
  leases = redis.call('ZRANGE', roster .. 'workers', ARGV[2], '+inf', 'BYSCORE', 'LIMIT', ARGV[3], most, 'WITHSCORES')
end
reply[4] = #members == most and changed[2 * most] or reply[2]
reply[5], reply[6], reply[7] = is_unknown and 1 or 0, told, leases
return reply

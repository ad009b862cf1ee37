#!lua flags=allow-oom
-- forget: removes what is kept of members that were made void long ago and of whose coverage nothing is left. Who comes
-- back takes an epoch above all that it had, because epochs are no less than the server's time.
--
-- KEYS[1]    dp:{<ns>}:epochs; the other keys of the workers are derived from it and share its slot
-- ARGV[1]    how long ago the member has to have been made void, ms
-- ARGV[2..]  members
-- returns    {member that is forgotten, ...}
-- flags      allow-oom: it only makes room
-- cost       two HGET, two ZSCORE and an HGET a member, three HDEL, a ZREM and a DEL for one that is forgotten
-- @include clock
-- @include roster
local before, forgotten = now - tonumber(ARGV[1]), {}
for i = 2, #ARGV do
  local member = ARGV[i]
  local epoch, voided = redis.call('HGET', KEYS[1], member), redis.call('HGET', roster .. 'voided', member)
  local swept = tonumber(redis.call('HGET', roster .. 'swept', member) or '') or 0
  local is_void = epoch and epoch == voided and swept >= (tonumber(epoch) or math.huge)
  local since = tonumber(redis.call('ZSCORE', roster .. 'changes', member) or 'inf')
  if is_void and since <= before and not redis.call('ZSCORE', roster .. 'workers', member) then
    for _, name in ipairs({ 'epochs', 'voided', 'swept' }) do
      redis.call('HDEL', roster .. name, member)
    end
    redis.call('ZREM', roster .. 'changes', member)
    redis.call('DEL', roster .. 'w:' .. member)
    forgotten[#forgotten + 1] = member
  end
end
return forgotten

#!lua flags=allow-oom
-- retire: these members are gone: what they published counts for nothing from now on, however much it is.
--
-- KEYS[1]    dp:{<ns>}:epochs; the other keys of the workers are derived from it and share its slot
-- ARGV[1..]  member, epoch, ...: retired only while that is its epoch; "" for whichever it has
-- returns    members retired
-- flags      allow-oom: it only makes room
-- cost       HGET, HINCRBY, ZREM, DEL, ZADD, SET a member, whatever it holds
-- @include clock
-- @include roster
local retired = 0
for i = 1, #ARGV, 2 do
  local current = redis.call('HGET', KEYS[1], ARGV[i])
  if current and (ARGV[i + 1] == '' or ARGV[i + 1] == current) then
    void(ARGV[i])
    retired = retired + 1
  end
end
return retired

-- Refuses a shard that is not there (never attached, or flushed) or that another schema wrote. ARGV[1] is the schema
-- that the caller speaks and, with spaces between, its epoch and the member that it writes as; without one nothing is
-- counted. Defines `caller`, `caller_epoch`, `writers` (member to epoch and number of writes), `written` (the caller's
-- under this epoch; -1 where a newer process has its name), `generation`.
local speaks, caller_epoch, caller = ARGV[1]:match('^(%S+) ?(%d*) ?(.*)$')
local schema, generation = unpack(redis.call('HMGET', KEYS[1], 'schema', 'created'))
if not schema then
  return redis.error_reply('DPGONE the namespace is not attached here: attach again')
elseif schema ~= speaks then
  return redis.error_reply('DPSCHEMA the tree has schema ' .. schema .. ', the caller speaks ' .. (speaks or ''))
end
local writers, written = KEYS[1]:sub(1, -5) .. 'writers', 0
if caller ~= '' then
  local epoch, count = (redis.call('HGET', writers, caller) or ''):match('^(%d+):(%d+)$')
  if epoch == caller_epoch then
    written = tonumber(count)
  elseif epoch and tonumber(epoch) > tonumber(caller_epoch) then
    written = -1
  end
end

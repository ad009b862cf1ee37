-- Refuses a shard that is not there (never attached, or flushed) or that another schema wrote. ARGV[1] is the schema
-- that the caller speaks and, behind a space, the member that it writes as; without one nothing is counted. Defines
-- `caller`, `writers` (member to the number of its writes), `written` (that of the caller), `generation`.
local speaks, caller = ARGV[1]:match('^(%S+) ?(.*)$')
local schema, generation = unpack(redis.call('HMGET', KEYS[1], 'schema', 'created'))
if not schema then
  return redis.error_reply('DPGONE the namespace is not attached here: attach again')
elseif schema ~= speaks then
  return redis.error_reply('DPSCHEMA the tree has schema ' .. schema .. ', the caller speaks ' .. (speaks or ''))
end
local writers = KEYS[1]:sub(1, -5) .. 'writers'
local written = tonumber(caller ~= '' and redis.call('HGET', writers, caller) or '') or 0

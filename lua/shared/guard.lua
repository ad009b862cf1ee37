-- Refuses a shard that is not there (never attached, or flushed) or that another schema wrote.
local schema = redis.call('HGET', KEYS[1], 'schema')
if not schema then
  return redis.error_reply('DPGONE the namespace is not attached here: attach again')
elseif schema ~= ARGV[1] then
  return redis.error_reply('DPSCHEMA the tree has schema ' .. schema .. ', the caller speaks ' .. ARGV[1])
end

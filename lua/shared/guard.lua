-- Refuses a shard that is not there (never attached, or flushed) or that another schema wrote. ARGV[1] says who calls:
-- the schema, and with spaces between the epoch and the member; without these nothing is counted. Under that very name
-- meta has how many writes of the caller there were. Defines `generation`, and `written`: that number, -1 where a newer
-- process writes as this member. `writers` has the name that each member writes under.
local schema, generation, counted = unpack(redis.call('HMGET', KEYS[1], 'schema', 'created', ARGV[1]))
if not schema then
  return redis.error_reply('DPGONE the namespace is not attached here: attach again')
elseif schema ~= ARGV[1]:match('^%S*') then
  return redis.error_reply('DPSCHEMA the tree has schema ' .. schema .. ', not that of the caller: ' .. ARGV[1])
end
local writers, epoch_of, written = KEYS[1]:sub(1, -5) .. 'writers', '^%S+ (%d+) ', tonumber(counted or 0)
if not counted and ARGV[1] ~= schema then -- the caller's first write, or a server that has lost those before it
  local name = redis.call('HGET', writers, ARGV[1]:match('^%S+ %d+ (.*)$')) or ''
  written = (tonumber(name:match(epoch_of)) or 0) > tonumber(ARGV[1]:match(epoch_of)) and -1 or 0
end

-- Refuses a shard that is not there (never attached, or flushed) or that another schema wrote. ARGV[1] says who calls:
-- the schema, and with spaces between the epoch and the member; without these nothing is counted. Under that very name
-- meta has how many writes of the caller there were. Defines `generation`, and `written`: that number, -1 where a newer
-- process writes as this member. The hash "writers" has the name that each member writes under. Defines `shard`: its
-- counts, which are read in the same command.
local shard = redis.call('HMGET', KEYS[1], 'nodes', 'chunks', 'bytes', 'warm', 'cold', 'schema', 'created', ARGV[1])
local schema, generation = shard[6], shard[7]
if not schema then
  return redis.error_reply('DPGONE the namespace is not attached here: attach again')
elseif schema ~= ARGV[1]:match('^%S*') then
  return redis.error_reply('DPSCHEMA the tree has schema ' .. schema .. ', not that of the caller: ' .. ARGV[1])
end
local written = tonumber(shard[8] or 0) or 0
local damaged = 0 -- places that cannot be as they are and were passed over: the reply tells how many, if any
if not shard[8] and ARGV[1] ~= schema then -- the caller's first write, or a server that has lost those before it
  local epoch, member = ARGV[1]:match('^%S+ (%d+) (.*)$')
  local name = redis.call('HGET', KEYS[1]:sub(1, -5) .. 'writers', member) or ''
  written = (tonumber(name:match('^%S+ (%d+) ')) or 0) > tonumber(epoch) and -1 or 0
end

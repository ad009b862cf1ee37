-- Tells the log what L1s must forget, numbered, so that who reads it sees whether anything is missing.
local function tell(...)
  local number = redis.call('HINCRBY', KEYS[1], 'log', 1)
  redis.call('XADD', base .. 'log', 'MAXLEN', '~', 10000, '*', 'n', number, ...)
end

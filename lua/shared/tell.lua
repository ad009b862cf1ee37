-- Tells the log what L1s must forget, numbered, so that who reads it sees whether anything is missing. A number or a
-- stream that cannot go on begins anew: readers find a gap, and forget everything.
local function tell(...)
  local number = redis.pcall('HINCRBY', KEYS[1], 'log', 1)
  if type(number) ~= 'number' then
    number = 1
    damaged = damaged + 1
    redis.call('HSET', KEYS[1], 'log', number)
  end
  if type(redis.pcall('XADD', base .. 'log', 'MAXLEN', '~', 10000, '*', 'n', number, ...)) == 'table' then
    damaged = damaged + 1
    redis.call('UNLINK', base .. 'log')
    redis.call('XADD', base .. 'log', '*', 'n', number, ...)
  end
end

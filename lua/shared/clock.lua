-- The server's clock, in ms: leases and claims end by it, whatever the clocks of those who took them say.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

-- Bounds the work of one call, so that no call holds up the server for long. Work is counted in units of about 10
-- microseconds on a common core, not in time, so that a call does the same on every server and in every test.
-- Defines: allow(units) sets what the call may spend (200, about 2 ms, unless it is called); spend(units) counts work,
-- before or after it is done; is_spent() says whether the call has to end now and leave the rest to the next one.
-- Common prices: 1 for up to five commands that read a small value, for 25 elements of a reply, or for 16 KB read or
-- written; 3 for a node that is changed and told to the log.
local units_left = 200

local function allow(units)
  units_left = units
end

local function spend(units)
  units_left = units_left - units
end

local function is_spent()
  return units_left <= 0
end

-- What a server for cold payloads has to be told is in `unsettled`, `trash` and `kept`. One that is of another type
-- holds nothing that could be told: it is removed, before anything else is written.
for name, kind in pairs({ unsettled = 'hash', trash = 'set', kept = 'set' }) do
  local found = redis.call('TYPE', base .. name).ok
  if found ~= 'none' and found ~= kind then
    redis.call('UNLINK', base .. name)
    damaged = damaged + 1
  end
end

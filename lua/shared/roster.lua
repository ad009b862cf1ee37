-- The namespace's workers. All names are derived from KEYS[1], dp:{<ns>}:epochs, and lie in its slot. A member is one
-- rank of a worker, <worker>/<rank>: what it published counts under its newest epoch only, and while its lease lasts.
local roster = KEYS[1]:sub(1, -7)

-- What readers know of the member is outdated: they ask for the members that changed since the version that they know.
-- The end of a lease that is renewed does not count. A version is near the server's time in ms and never comes again,
-- not even when everything was flushed.
local function changed(member)
  local version = tonumber(redis.pcall('GET', roster .. 'version') or '') or 0
  version = version >= 0 and version < 9e15 and version or 0 -- no version that was given
  version = ('%.0f'):format(math.max(version + 1, now))
  redis.call('ZADD', roster .. 'changes', version, member)
  redis.call('SET', roster .. 'version', version)
end

-- Has the member hold a lease for `ttl` ms from now on, and says of it what stands in ARGV from `first` on. Readers
-- have to know of one that ends earlier than they think, or that had ended.
local function hold(member, ttl, first)
  local ends = tonumber(redis.call('ZSCORE', roster .. 'workers', member) or '')
  if not ends or now + ttl < ends or ends < now then
    changed(member)
  end
  redis.call('ZADD', roster .. 'workers', ('%.0f'):format(now + ttl), member)
  if ARGV[first] then
    redis.call('HSET', roster .. 'w:' .. member, unpack(ARGV, first))
  end
end

-- The member's lease ends, and all that it published counts for nothing. It may find out that nobody took its place.
local function void(member)
  local epoch = redis.pcall('HINCRBY', KEYS[1], member, 1)
  if type(epoch) ~= 'number' then -- what was stored is no epoch: one above all that were given
    epoch = ('%.0f'):format(now)
    redis.call('HSET', KEYS[1], member, epoch)
  end
  redis.call('HSET', roster .. 'voided', member, epoch)
  redis.call('ZREM', roster .. 'workers', member)
  redis.call('DEL', roster .. 'w:' .. member)
  changed(member)
end

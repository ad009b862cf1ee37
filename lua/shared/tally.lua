-- A junction counts for each holder how many of its children that holder covers, under whatever epoch; the roots are
-- counted in `holders`. So a script finds what a holder covers without looking at what it does not.
-- Defines: counts_key(parent), tally(parent, holder, change), tally_all(parent, flat, change). `parent`: the chunk that
-- the junction is named by, "" for the roots.
local function counts_key(parent)
  return parent == '' and base .. 'holders' or junction_key(parent)
end

-- The holder covers one child more, or one less. A key that is no hash does not end a script that has written already.
local function tally(parent, holder, change)
  local key = counts_key(parent)
  local count = redis.pcall('HINCRBY', key, holder, change)
  if type(count) ~= 'number' then -- what was stored is no number: what is right, repair knows
    count = change
    damaged = damaged + 1
    redis.pcall('HSET', key, holder, count)
  end
  if count <= 0 then
    redis.pcall('HDEL', key, holder)
  end
end

-- Likewise for every holder that a node's fields (name, value, ...) name, in portions: there may be thousands.
local function tally_all(parent, flat, change)
  local key, names = counts_key(parent), {}
  for i = 1, #flat, 2 do
    if flat[i]:sub(1, 2) == 'h:' then
      names[#names + 1] = flat[i]:sub(3)
    end
  end
  if #names <= 2 then
    for _, name in ipairs(names) do
      tally(parent, name, change)
    end
    return
  end
  for first = 1, #names, 500 do
    local last, kept, ended = math.min(first + 499, #names), {}, {}
    for i, count in ipairs(redis.pcall('HMGET', key, unpack(names, first, last))) do
      local left = count_of(count) + change
      if left > 0 then
        kept[#kept + 1] = names[first + i - 1]
        kept[#kept + 1] = left
      else
        ended[#ended + 1] = names[first + i - 1]
      end
    end
    if #kept > 0 then
      redis.call('HSET', key, unpack(kept))
    end
    if #ended > 0 then
      redis.call('HDEL', key, unpack(ended))
    end
  end
end

-- The longest coverage that anyone has of a node: a leaf's chunks behind it are kept by nobody.
local function longest_coverage(fields)
  local longest = 0
  for i = 1, #fields, 2 do
    if fields[i]:sub(1, 2) == 'h:' then
      longest = math.max(longest, count_of(fields[i + 1]:match('^%d+:(%d+)$')))
    end
  end
  return longest
end

-- The holder keeps the first `keep` chunks of a node at most. A leaf that nobody covers is removed, one that nobody
-- covers to its end is cut, unless `of_nothing`: then the coverage counted for nothing, readers are not told, and the
-- caller looks at the leaf. Returns chunks of coverage taken away, nodes removed, chunks removed.
local function uncover(head, holder, keep, of_nothing)
  local key = node_key(head)
  local run, held, ids, keys, parent =
    unpack(redis.call('HMGET', key, 'r', 'h:' .. holder, 'b:' .. holder, 'e:' .. holder, 'p'))
  local epoch, covered = coverage_of(held)
  local left, columns = math.min(covered, keep), { ['b:'] = ids or '', ['e:'] = keys or '' }
  spend(0.5)
  if left == covered and (covered > 0 or not held) then
    return 0, 0, 0 -- what is stored and says no number of chunks is removed
  end
  run = run or ''
  if tiers[holder] then
    local gone = -sum_of(columns['b:'], left)
    account(0, 0, 0, 0, holder == '@warm' and gone or 0, holder == '@cold' and gone or 0)
    release(holder, run, columns['b:'], left)
    spend(math.min(covered - left, 256) / 10)
  end
  spend(3)
  if left == 0 then
    redis.call('HDEL', key, 'h:' .. holder, 'b:' .. holder, 'e:' .. holder)
    tally(parent or '', holder, -1)
    account(0, 0, -1, -#columns['b:'] - #columns['e:'])
  else
    redis.call('HSET', key, 'h:' .. holder, epoch .. ':' .. left)
    for kind, value in pairs(columns) do
      local most = left * (kind == 'b:' and 4 or #value / covered)
      if #value > most then
        redis.call('HSET', key, kind .. holder, value:sub(1, most))
        account(0, 0, 0, most - #value)
      end
    end
  end
  if of_nothing then
    return covered - left, 0, 0
  elseif #run >= 16 and redis.pcall('HLEN', junction_key(hex(run))) == 0 then
    local flat, node = fields_of(head)
    local longest = longest_coverage(flat)
    spend(#flat / 100)
    if longest == 0 then
      return covered - left, 1, unlink(head, flat, node)
    elseif longest < #run / 16 then
      if left < longest then
        tell('changed', head)
      end
      return covered - left, 0, shorten(head, longest, flat, node)
    end
  end
  tell('changed', head)
  return covered - left, 0, 0
end

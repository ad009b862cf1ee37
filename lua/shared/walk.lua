-- How many leading chunks of `run` equal the chain from chunk `first` on: one comparison, or a bisection.
local function match(run, chain, first)
  local limit = math.min(#run / 16, #chain / 16 - first)
  if limit * 16 == #run and chain:find(run, first * 16 + 1, true) == first * 16 + 1 then
    return limit -- compared in place: cutting out and interning 4 KB twice takes longer
  elseif slice(run, 0, limit) == slice(chain, first, first + limit) then
    return limit
  end
  local low, high = 0, limit - 1
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if slice(run, low, middle) == slice(chain, first + low, first + middle) then
      low = middle
    else
      high = middle - 1
    end
  end
  return low
end

-- Describes the nodes on the chain's path in a flat array, 8 elements a node and then 2 a holder:
-- size, matched, accessed, hits, created, metadata, block ids of `holder`, number of holders, (holder, epoch:k)...
-- Stops at the end of the chain, where it leaves the tree, and at a hole or a damaged node. With `count` and
-- `is_over`, which are `spend` and `is_spent`, it stops between two nodes when the call's budget is spent as well: then
-- "more" is the last element.
local function walk(chain, holder, reply, count, is_over)
  local first, total, wanted = 0, #chain / 16, 'b:' .. holder
  while first < total do
    local fields = redis.pcall('HGETALL', node_key(hex(chain, first)))
    local node, holders, ids = { r = '', a = '0', n = '0', c = '0', m = '', p = '', d = '' }, {}, ''
    for i = 1, #fields, 2 do
      local name = fields[i]
      if node[name] then
        node[name] = fields[i + 1]
      elseif name:sub(1, 2) == 'h:' then
        holders[#holders + 1], holders[#holders + 2] = name:sub(3), fields[i + 1]
      elseif name == wanted then
        ids = fields[i + 1]
      end
    end
    local run = node.r
    local matched = #run % 16 == 0 and match(run, chain, first) or 0
    if matched == 0 then
      break
    end
    local n = #reply
    reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4] = #run / 16, matched, node.a, node.n
    reply[n + 5], reply[n + 6], reply[n + 7], reply[n + 8] = node.c, node.m, ids, #holders / 2
    for i = 1, #holders do
      reply[n + 8 + i] = holders[i]
    end
    first = first + matched
    if matched < #run / 16 then
      break
    elseif count then
      count(1 + #fields / 25)
      if first < total and is_over() then
        reply[#reply + 1] = 'more'
        break
      end
    end
  end
  return reply
end

-- What keeps a chain from being published now, where names that it gives are there already: an error, or nil for
-- nothing. `new`: as `plan` returns it; `lower`, `ends`: head of the lower half of a split, last chunk of what becomes
-- an inner node, or nil; `node`: what the new nodes are to hang from, nil for the roots of the tree.
--
-- Chained hashes do not repeat, and a chunk always has the same ones before it. The library looks at every chunk of a
-- chain that a caller gives; here it counts whether a name is that of a node elsewhere, which might be above itself.
--
-- Children of a node that was lost are orphans. Where there are many of them, some tens are removed in a call, and the
-- caller calls again; `disown` removes what is left. The parts are inside: a script makes its functions at each call.
local function hindrance_of(new, chain, depth, with, node, stop, lower, ends)
  -- Whether a node with this head, or one that ends with this chunk, is at another place than chunk `first`, `behind`.
  local function is_elsewhere(head, first)
    local parent, at = unpack(redis.call('HMGET', node_key(head), 'p', 'd'))
    return (parent and parent ~= (first > 0 and hex(chain, first - 1) or '')) or (at and tonumber(at) ~= depth + first)
  end

  local function ends_elsewhere(last, behind)
    local owner = redis.call('HGET', junction_key(last), 'o')
    local run, at = unpack(owner and redis.pcall('HMGET', node_key(owner), 'r', 'd') or {})
    return is_run(owner, run) and hex(run) == last and count_of(at) + #run / 16 ~= depth + behind
  end

  if node and (redis.call('HGET', junction_key(hex(node.run)), 'o') or node.head) ~= node.head then
    return redis.error_reply('DPDAMAGED what follows node ' .. node.head .. ' belongs to another one')
  end
  local repeats = new.repeats or (ends and ends_elsewhere(ends, stop)) or (lower and is_elsewhere(lower, stop))
  for i, each in ipairs(new) do
    local first = stop + (i - 1) * with.max_run
    local behind = math.min(first + with.max_run, #chain / 16)
    repeats = repeats or is_elsewhere(each[1], first) or ends_elsewhere(each[2], behind)
  end
  if repeats then
    return redis.error_reply('DPDAMAGED the chain has a chunk twice: chained hashes do not repeat')
  end
  local junctions, most = { ends }, 50
  for _, each in ipairs(new) do
    junctions[#junctions + 1] = each[2]
  end
  for _, last in ipairs(junctions) do
    local key = junction_key(last)
    if redis.call('HLEN', key) > most then
      local fields = redis.call('HSCAN', key, '0', 'COUNT', most)[2]
      for i = 1, math.min(#fields, 4 * most), 2 do
        if is_child(fields[i]) and redis.pcall('HGET', node_key(fields[i]), 'p') == last then
          discard(fields[i])
        end
        redis.call('HDEL', key, fields[i])
      end
      settle()
      return redis.error_reply('DPAGAIN orphans are in the way: some of them are removed now')
    end
  end
end

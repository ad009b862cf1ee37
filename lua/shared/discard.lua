-- A node about to be made that is there already lost its parent once (a failover): it is replaced.
local function discard(head)
  local orphan = redis.call('HGET', node_key(head), 'r')
  if orphan then
    local holders, extra = weigh(redis.call('HGETALL', node_key(head)))
    account(-1, -math.floor(#orphan / 16), -holders, -extra)
    redis.call('DEL', node_key(head))
    redis.call('ZREM', base .. 'leaves', head)
  end
end

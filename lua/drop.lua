#!lua flags=allow-oom
-- drop: take out a whole subtree, leaves before their parents, so much of it a call: call again until done.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; every other key is derived from it and shares its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    the subtree's head in hex, or "root" for all there is
-- ARGV[3]    what the call before returned to resume with, "" in the first
-- ARGV[4]    units of work to do in this call
-- returns    {nodes removed, chunks removed, "" when nothing is left of it, else what to resume with}
-- errors     DPGONE, DPSCHEMA
-- flags      allow-oom: it only makes room
-- cost       two HMGET, a share of an HSCAN and one removal a node
-- @include guard
-- @include writes
-- @include budget
-- @include keys
-- @include tally
-- @include policies
-- @include score
-- @include payload
-- @include release
-- @include account
-- @include tell
-- @include fields
-- @include discard
-- @include unlink
-- @include climb
-- @include descend
allow(tonumber(ARGV[4]))
redis.call('ZCARD', base .. 'leaves')
redis.call('XLEN', base .. 'log')

local nodes, chunks = 0, 0
local visit = {
  wanted = function(last) return count_of(redis.pcall('HLEN', junction_key(last))) end,
  wants = function(child, last)
    local parent, run = unpack(redis.pcall('HMGET', node_key(child), 'p', 'r'))
    if run and parent == last then
      return true
    end
    redis.call('HDEL', junction_key(last), child) -- its key was lost, as a failover may; or it is no child
    damaged = damaged + (run and 1 or 0)
  end,
  leave = function(head, run)
    if head ~= 'root' and run then
      nodes, chunks = nodes + 1, chunks + unlink(head, fields_of(head))
    end
  end,
}
local resume = descend(ARGV[2], ARGV[3], visit)
settle()
return answer({ nodes, chunks, resume })

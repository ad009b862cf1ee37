#!lua flags=no-writes
-- walk: the longest prefix of a chain that the tree has, node by node, beginning at a node's head.
--
-- KEYS[1]    dp:{<ns>:<shard>}:meta; the node keys are derived from it and share its slot
-- ARGV[1]    who calls: the schema it speaks, its epoch and member
-- ARGV[2]    holder whose block ids are wanted, or ""
-- ARGV[3]    the chain, 16 bytes a chunk, at most 4,096 chunks and one run; its first chunk is a node's head
-- returns    {size, matched, accessed, hits, created, metadata, blocks, holders, (holder, "epoch:k")..., size, ...},
--            and "more" at the end when the call stopped for its budget: go on behind the last node
-- errors     DPGONE, DPSCHEMA
-- flags      no-writes: runs on replicas, and when the server is out of memory
-- cost       one HGETALL a node; stops at the first hole, and after about 120 nodes
-- @include guard
-- @include reads
-- @include keys
-- @include budget
-- @include walk
local holder, chain = ARGV[2], ARGV[3]
return answer(walk(chain, holder, {}, spend, is_spent))

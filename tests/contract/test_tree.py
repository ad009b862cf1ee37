"""The shared tree itself: splits, runs, windows, trims, holes, counted calls."""

from __future__ import annotations

import time
from typing import Any

import pytest

from distprefix import Chain, PrefixCacheOptimizer, operations
from distprefix.errors import DamagedNodeError, DistPrefixError, NoParentError
from tests.contract.test_find import prompt
from tests.servers import Backend, hashes_of


def sound(cache: PrefixCacheOptimizer, nodes: int, chunks: int) -> None:
    """The tree keeps its invariants and has exactly so many nodes and chunks."""
    report = cache.check_integrity()
    assert (report.problems, report.nodes, report.chunks) == ([], nodes, chunks)


def heads(tokens: list[int]) -> list[str]:
    """Chunk hashes of a prompt in hex, in the namespace of this test."""
    packed = hashes_of(tokens)
    return [packed[i : i + 16].hex() for i in range(0, len(packed), 16)]


def fields(backend: Backend, key: str) -> dict[bytes, bytes]:
    """A hash as it is stored."""
    stored: Any = backend.admin.hgetall(key)
    return stored


def test_a_split_keeps_coverage_and_blocks_of_every_holder(any_server: Backend) -> None:
    """Splitting a run cuts each holder's coverage and block ids in two and loses nothing."""
    one, two = any_server.open("w1"), any_server.open("w2")
    one.cache_prefix(prompt(10), range(10))
    two.cache_prefix(prompt(4), range(40, 44))
    any_server.open("w3").cache_prefix(prompt(10, tail=6), range(60, 70))
    sound(one, 3, 14)
    upper, lower = (fields(any_server, any_server.keys.node(head)) for head in (heads(prompt(10))[i] for i in (0, 6)))
    assert upper[b"h:w1/0@gpu"].endswith(b":6")
    assert upper[b"h:w2/0@gpu"].endswith(b":4")
    assert lower[b"h:w1/0@gpu"].endswith(b":4")
    assert b"h:w2/0@gpu" not in lower
    reader = any_server.open("w4")
    for holder, blocks in (("w1", range(10)), ("w2", range(40, 44)), ("w3", range(60, 66))):
        assert reader.find_longest_cache_hit(prompt(10), blocks_of=f"{holder}/0@gpu").block_ids == tuple(blocks)


def test_a_split_of_an_inner_node_moves_no_child(any_server: Backend) -> None:
    """Splitting a node with children changes the owner of its junction and leaves the children's keys alone."""
    cache = any_server.open()
    for tail in (5, 6, 0):
        cache.cache_prefix(prompt(8, tail=tail))
    before = any_server.dump()
    child = any_server.keys.node(heads(prompt(8, tail=6))[6])
    cache.cache_prefix(prompt(4, tail=2))
    assert any_server.dump()[child] == before[child]
    sound(cache, 7, 15)


def test_leaves_grow_up_to_max_run(any_server: Backend) -> None:
    """A leaf takes new chunks in while it has room; what is over goes into nodes of at most max_run chunks."""
    cache = any_server.open(max_run=8)
    for chunks, nodes in ((3, 1), (8, 1), (9, 2), (15, 2), (16, 2), (40, 5)):
        cache.cache_prefix(prompt(chunks), range(chunks))
        report = cache.check_integrity()
        assert (report.problems, report.nodes, report.chunks) == ([], nodes, chunks)
    sizes = [len(value[b"r"]) // 16 for key, value in any_server.dump().items() if ":n:" in key]
    assert sizes == [8] * 5


@pytest.mark.parametrize("chunks", [4095, 4096, 4097, 9000])
def test_prompts_longer_than_a_window(any_server: Backend, chunks: int) -> None:
    """Prompts of many thousand chunks go in windows of 4,096, with all block ids, one call each."""
    calls = -(-chunks // 4096)
    writer, reader = any_server.open("w1"), any_server.open("w2")
    tokens = prompt(chunks)
    before = writer.get_metrics()["redis_calls_publish"]
    writer.cache_prefix(tokens, range(chunks))
    if any_server.is_real:
        assert writer.get_metrics()["redis_calls_publish"] - before in (calls, calls + 2)  # SCRIPT LOAD the first time
    result = reader.find_longest_cache_hit(tokens, blocks_of="w1/0@gpu")
    assert (result.matched_chunks, result.redis_calls) == (chunks, calls)
    assert result.block_ids == tuple(range(chunks))
    assert writer.get_computed_blocks(tokens) == list(range(chunks))
    sound(writer, -(-chunks // 256), chunks)


@pytest.mark.parametrize("ends", [(), (10,), (10, 5), (10, 14), (12, 12), (10, -6), (10, -12, 3)])
def test_a_publish_tells_what_a_walk_would(any_server: Backend, ends: tuple[int, ...]) -> None:
    """What a publish says of its path is what is there: of nodes made, grown, split, branched off, lost by failover."""
    cache, chain = any_server.open("w1", max_run=4), bytes.fromhex("".join(heads(prompt(20))))
    link = cache._state.link

    def publish(chain: bytes, holder: str, metadata: bytes) -> operations.Published:
        return link.publish(operations.publish(chain, 0, holder, 1, max_run=4, blocks=chain[::4], metadata=metadata))

    for end in ends:
        if end < 0:  # a failover takes a node, what lies behind it is in the way of what is made
            any_server.admin.delete(any_server.keys.node(chain[16 * (-end // 4 * 4) :][:16].hex()))
        else:
            publish(chain[: 16 * end], "w2/0@gpu", b"m" * (end == 12))
    told = publish(chain, "w1/0@gpu", b"of all")
    assert told.views == link.look_up(operations.walk(chain, 0), time.monotonic() + 5)[0]
    assert told.views[-1].metadata == b"of all"
    branch = chain[: 16 * 6] + bytes(range(16 * 9))
    assert publish(branch, "w1/0@gpu", b"").views == link.look_up(operations.walk(branch, 0), time.monotonic() + 5)[0]
    if all(end > 0 for end in ends):
        assert cache.check_integrity().problems == []


def test_windows_that_end_inside_a_run(any_server: Backend) -> None:
    """A window may end in the middle of a node: the next one begins at that node's head and nothing is lost."""
    writer = any_server.open("w1")
    writer.cache_prefix(prompt(100, tail=90))
    writer.cache_prefix(prompt(8200), range(8200))
    result = any_server.open("w2").find_longest_cache_hit(prompt(8200, tail=8150), blocks_of="w1/0@gpu")
    assert (result.matched_chunks, result.block_ids) == (8150, tuple(range(8150)))
    writer.cache_prefix(prompt(8200), range(8200))
    writer.remove_skipped_blocks([8100])
    assert any_server.open("w3").find_longest_cache_hit(prompt(8200)).matched_chunks == 8100


def test_calls_are_counted(any_server: Backend) -> None:
    """A look-up costs no call when L1 answers and one when it does not; a publish costs one."""
    writer, reader = any_server.open("w1"), any_server.open("w2")
    for cache in (writer, reader):  # what is loaded once is not counted
        cache.cache_prefix(prompt(4))
        cache.find_longest_cache_hit(prompt(5))

    def calls(cache: PrefixCacheOptimizer) -> int:
        if any_server.is_real:
            return any_server.script_calls()
        metrics = cache.get_metrics()
        return int(metrics["redis_calls_lookup"] + metrics["redis_calls_publish"])

    def cost(cache: PrefixCacheOptimizer, publish: int = 0, look_up: int = 0) -> int:
        before = calls(cache)
        if publish:
            cache.cache_prefix(prompt(publish))
        if look_up:
            cache.find_longest_cache_hit(prompt(look_up))
        return calls(cache) - before

    assert cost(writer, publish=40) == 1
    assert cost(writer, look_up=40) == 0
    assert cost(writer, look_up=20) == 0
    assert cost(reader, look_up=40) == 1
    assert cost(reader, look_up=40) == 0
    assert cost(reader, look_up=41) == 1


def test_a_walk_goes_on_where_l1_stopped(any_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What L1 knows is not asked again: the chain sent begins at the last node that L1 has."""
    writer, reader = any_server.open("w1", max_run=4), any_server.open("w2", max_run=4)
    writer.cache_prefix(prompt(8))
    reader.find_longest_cache_hit(prompt(8))
    writer.cache_prefix(prompt(30))
    sent: list[tuple[int, int]] = []
    walk = operations.walk

    def spy(chain: bytes, start: int, *args: Any, **more: Any) -> Any:
        sent.append((len(chain) // 16, start))
        return walk(chain, start, *args, **more)

    monkeypatch.setattr(operations, "walk", spy)
    result = reader.find_longest_cache_hit(prompt(32))
    assert (result.matched_chunks, result.l1_chunks, sent) == (30, 8, [(28, 4)])


def test_a_publish_goes_on_where_the_last_one_stopped(any_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that extends one just published sends only its last known node and what is new."""
    writer = any_server.open("w1", max_run=4)
    writer.cache_prefix(prompt(10), range(10))
    sent: list[tuple[int, int]] = []
    publish = operations.publish

    def spy(chain: bytes, start: int, *args: Any, **more: Any) -> Any:
        sent.append((len(chain) // 16, start))
        return publish(chain, start, *args, **more)

    monkeypatch.setattr(operations, "publish", spy)
    writer.cache_prefix(prompt(15), range(15))
    assert sent == [(7, 8)]
    assert any_server.open("w2", max_run=4).find_longest_cache_hit(prompt(15)).matched_chunks == 15


def test_touches_count_and_order_leaves(any_server: Backend) -> None:
    """Touches add hits, renew the access time, move the leaf to the end of the order, and never go back in time."""
    cache = any_server.open()
    cache.cache_prefix(prompt(3))
    cache.cache_prefix(prompt(3, tail=1)[4:])
    old, new = heads(prompt(3))[0], heads(prompt(3, tail=1)[4:])[0]
    time.sleep(0.002)  # the server's clock counts milliseconds, and equal scores are in the order of names
    touched = cache._state.link.publish(operations.touch([(bytes.fromhex(old), 2, 0), (b"\0" * 16, 1, 0)]))
    assert touched == 1
    leaves: Any = any_server.admin.zrange(any_server.keys.leaves, 0, -1)
    assert leaves == [new.encode(), old.encode()]
    used = fields(any_server, any_server.keys.node(old))[b"a"]
    cache._state.link.publish(operations.touch([(bytes.fromhex(old), 1, 60_000)]))
    node = fields(any_server, any_server.keys.node(old))
    assert (node[b"n"], node[b"a"]) == (b"3", used)


def test_hits_reach_redis_with_the_next_batch(any_server: Backend) -> None:
    """Hits that L1 answered are told to Redis by flush, one call for many."""
    cache = any_server.open()
    cache.cache_prefix(prompt(3))
    for _ in range(4):
        cache.find_longest_cache_hit(prompt(3))
    cache.flush()
    assert fields(any_server, any_server.keys.node(heads(prompt(3))[0]))[b"n"] == b"4"


def test_drop_takes_a_subtree_in_portions(any_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping a head removes all below it, in as many calls as the bound asks for, and leaves the rest sound."""
    monkeypatch.setattr(operations, "WORK_A_CALL", 3)
    cache = any_server.open(max_run=2)
    cache.cache_prefix(prompt(20))
    cache.cache_prefix(prompt(20, tail=4))
    assert cache._state.link.administer(operations.drop(heads(prompt(20))[4])) == (8, 16)
    sound(cache, 10, 20)
    assert any_server.open("w2", max_run=2).find_longest_cache_hit(prompt(20)).matched_chunks == 4


def test_clear_empties_the_namespace(any_server: Backend) -> None:
    """After clear nothing is found by anybody and only the empty shard's meta is left."""
    cache = any_server.open(max_run=3)
    for tail in range(1, 9):
        cache.cache_prefix(prompt(9, tail=tail), range(9))
    cache.clear()
    assert not cache.find_longest_cache_hit(prompt(9, tail=3)).hit
    assert not any_server.open("w2", max_run=3).find_longest_cache_hit(prompt(9, tail=3)).hit
    assert list(any_server.dump()) == [any_server.keys.meta]
    sound(cache, 0, 0)


def test_a_hole_stops_the_walk(any_server: Backend) -> None:
    """A node that was lost in the middle ends what is found, and publishing again heals it."""
    cache = any_server.open("w1", max_run=4)
    cache.cache_prefix(prompt(12), range(12))
    any_server.admin.delete(any_server.keys.node(heads(prompt(12))[4]))
    assert any_server.open("w2", max_run=4).find_longest_cache_hit(prompt(12)).matched_chunks == 4
    any_server.open("w3", max_run=4).cache_prefix(prompt(12))
    assert any_server.open("w4", max_run=4).find_longest_cache_hit(prompt(12)).matched_chunks == 12
    assert all("counts" in problem for problem in cache.check_integrity().problems)


@pytest.mark.parametrize("damage", [b"short", b"x" * 32, b""])
def test_a_damaged_node_is_a_clean_miss(any_server: Backend, damage: bytes) -> None:
    """A run of a wrong length or with a wrong head is not believed, and publishing over it changes nothing."""
    cache = any_server.open("w1", max_run=4)
    cache.cache_prefix(prompt(12))
    any_server.admin.hset(any_server.keys.node(heads(prompt(12))[4]), "r", damage)
    assert any_server.open("w2", max_run=4).find_longest_cache_hit(prompt(12)).matched_chunks == 4
    before = any_server.dump()
    with pytest.raises(DamagedNodeError, match=heads(prompt(12))[4]):
        any_server.open("w3", max_run=4).cache_prefix(prompt(14))
    assert any_server.dump() == before


@pytest.mark.parametrize("place", ["first node", "later node", "junction", "leaves", "meta"])
def test_foreign_keys_are_refused_without_partial_writes(any_server: Backend, place: str) -> None:
    """A string where a node, a junction, the leaves or the meta belongs makes a publish fail before it writes."""
    cache = any_server.open("w1", max_run=4)
    cache.cache_prefix(prompt(3))
    names = heads(prompt(3) + [9] * 40)
    keys = any_server.keys
    key = {
        "first node": keys.node(names[0]),
        "later node": keys.node(names[8]),
        "junction": keys.junction(names[7]),
        "leaves": keys.leaves,
        "meta": keys.meta,
    }[place]
    any_server.admin.delete(key)
    any_server.admin.set(key, "foreign")
    before = any_server.dump()
    other = any_server.open("w2", max_run=4, strict=False) if place != "meta" else cache
    with pytest.raises(DistPrefixError):
        other._state.link.publish(operations.publish(bytes.fromhex("".join(names)), 0, "w2/0@gpu", 99, max_run=4))
    assert any_server.dump() == before
    result = any_server.open("w4", max_run=4, strict=False) if place != "meta" else None
    if result is not None:
        found = result.find_longest_cache_hit(prompt(3))
        assert found.matched_chunks == (0 if place == "first node" else 3)


def test_touches_of_a_foreign_key_change_nothing(any_server: Backend) -> None:
    """Touching when the leaves are no sorted set fails before a hit is counted."""
    cache = any_server.open()
    cache.cache_prefix(prompt(3))
    any_server.admin.delete(any_server.keys.leaves)
    any_server.admin.set(any_server.keys.leaves, "foreign")
    before = any_server.dump()
    with pytest.raises(DistPrefixError):
        cache._state.link.publish(operations.touch([(bytes.fromhex(heads(prompt(3))[0]), 1, 5_000_000_000_000)]))
    assert any_server.dump() == before


def undated(backend: Backend) -> dict[str, Any]:
    """The tree without times of last use."""
    found = backend.dump()
    for name, value in found.items():
        if isinstance(value, dict):
            value.pop(b"a", None)
        elif name == backend.keys.leaves:
            found[name] = sorted(leaf for leaf, _ in value)
    return found


@pytest.mark.parametrize("first", [3, 10, 20])
def test_running_an_insert_again_changes_nothing(any_server: Backend, first: int) -> None:
    """The same insert call sent twice, as after a time-out, leaves the same tree, used later; so does a trim."""
    cache = any_server.open("w1", max_run=4)
    cache.cache_prefix(prompt(first))
    chain = bytes.fromhex("".join(heads(prompt(12, tail=7))))
    before: dict[str, Any] = {}
    for attempt in range(2):
        made = cache._state.link.publish(operations.publish(chain, 0, "w2/0@gpu", 1, max_run=4, blocks=b"abcd" * 12))
        assert attempt == 0 or (made.nodes_made, made.chunks_made, undated(any_server)) == (0, 0, before)
        before = undated(any_server)
    for attempt in range(2):
        taken = cache._state.link.publish(operations.trim(chain[: 16 * 6], "w2/0@gpu", 1))
        assert attempt == 0 or (taken, undated(any_server)) == (0, before)
        before = undated(any_server)
    assert cache.check_integrity().ok


def test_going_on_from_a_node_that_is_gone_is_refused(any_server: Backend) -> None:
    """A chain that starts at a depth needs its first node there; the cache then publishes it from the root."""
    cache = any_server.open("w1", max_run=4)
    cache.cache_prefix(prompt(8))
    chain = bytes.fromhex("".join(heads(prompt(12))))
    any_server.open("w2", max_run=4).clear()
    with pytest.raises(NoParentError):
        cache._state.link.publish(operations.publish(chain[64:], 4, "w1/0@gpu", 1, max_run=4))
    cache.cache_prefix(prompt(12))
    assert any_server.open("w3", max_run=4).find_longest_cache_hit(prompt(12)).matched_chunks == 12
    sound(cache, 3, 12)


def test_chains_and_tokens_share_one_tree(any_server: Backend) -> None:
    """A chain of the hashes that tokens have finds what was published as tokens, and the other way round."""
    cache = any_server.open("w1")
    cache.cache_prefix(prompt(6))
    chain = Chain(bytes.fromhex(head) for head in heads(prompt(9)))
    reader = any_server.open("w2")
    assert reader.find_longest_cache_hit(chain).matched_chunks == 6
    reader.cache_prefix(chain)
    assert any_server.open("w3").find_longest_cache_hit(prompt(9)).matched_chunks == 9


@pytest.mark.parametrize("max_bytes", [0, 3000])
def test_an_l1_smaller_than_the_prompt(any_server: Backend, max_bytes: int) -> None:
    """A prompt that does not fit L1's budget is found in full all the same, at one call a look-up."""
    any_server.open("w1", max_run=4).cache_prefix(prompt(40))
    reader = any_server.open("w2", max_run=4, l1_max_bytes=max_bytes)
    for _ in range(2):
        result = reader.find_longest_cache_hit(prompt(42))
        assert (result.matched_chunks, result.redis_calls) == (40, 1)
    assert reader.get_metrics()["l1_bytes"] <= max_bytes


def test_forgetting_in_l1_follows_redis(any_server: Backend) -> None:
    """What Redis no longer has is no longer found once L1's trust has run out."""
    cache, other = any_server.open("w1", l1_ttl_s=0), any_server.open("w2")
    other.cache_prefix(prompt(8))
    assert cache.find_longest_cache_hit(prompt(8)).matched_chunks == 8
    other.clear()
    assert not cache.find_longest_cache_hit(prompt(8)).hit
    assert cache.get_metrics()["l1_chunks"] == 0

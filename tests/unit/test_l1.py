"""What a process knows: snapshots, trust, and a budget that is honest."""

from __future__ import annotations

import random
import sys
import tracemalloc

import pytest

from distprefix import Chain
from distprefix.chunking import Prompt, read_prompt
from distprefix.hashing import ChunkHasher
from distprefix.l1 import L1, Node
from distprefix.nodes import NodeView

HOLDER = "w1/0@gpu"


def prompt_of(*chunks: int) -> Prompt:
    """A prompt of chunks of two tokens."""
    return read_prompt([token for chunk in chunks for token in (chunk, 9)], 2, 10_000_000)


def hashes_of(prompt: Prompt) -> bytes:
    """Its chunk hashes."""
    return ChunkHasher("xxh3_128", bytes(32)).chain(bytes(16), prompt.view, prompt.stride)


def view(start: int, size: int, matched: int, **holders: int) -> NodeView:
    """A node as Redis tells it; holders of epoch 1 by what they cover."""
    return NodeView(start, size, matched, 1, 0, 1, b"", b"", {name: (1, start + k) for name, k in holders.items()})


def learn(l1: L1, prompt: Prompt, now: float = 0.0, *views: NodeView) -> list[Node]:
    """Take over a path; by default one node with all of it, held by `w`."""
    told = list(views) or [view(0, prompt.chunks, prompt.chunks, w=prompt.chunks)]
    return l1.learn(prompt, hashes_of(prompt), 0, told, now)


def new(max_bytes: int = 1 << 30, ttl_s: float = 10.0, hot: int = 10, max_run: int = 256) -> L1:
    """An empty L1 for chunks of two tokens."""
    return L1(2, max_run, max_bytes, ttl_s, hot)


def live(holder: str, epoch: int) -> bool:
    """Everybody lives."""
    return True


def test_young_snapshots_are_trusted_and_old_ones_are_not() -> None:
    """What is older than the time to live still is there, but has to be asked for again, from its own head on."""
    l1, prompt = new(ttl_s=10), prompt_of(*range(8))
    learn(l1, prompt, 0.0, view(0, 4, 4, w=4), view(4, 4, 4, w=4))
    found = l1.find(prompt, 10.0)
    assert (found.chunks, found.fresh, found.resume) == (8, 8, 4)
    later = l1.learn(prompt, hashes_of(prompt), 0, [view(0, 4, 4, w=4)], 5.0)
    assert [node.stop for node in later] == [4]
    found = l1.find(prompt, 11.0)
    assert (found.chunks, found.fresh, found.resume) == (8, 4, 4)
    l1.distrust(l1.iter_nodes())
    assert (l1.find(prompt, 5.0).chunks, l1.find(prompt, 5.0).fresh) == (8, 0)


def test_coverage_counts_leading_runs() -> None:
    """A holder's prefix ends where its coverage of a node does, and goes on where it covers all of it."""
    l1, prompt = new(), prompt_of(*range(9))
    learn(l1, prompt, 0.0, view(0, 3, 3, a=3, b=2, c=3), view(3, 3, 3, a=3, c=1), view(6, 3, 3, a=2))
    assert l1.coverage(l1.find(prompt, 0.0).path, 9, live) == {"a": 8, "b": 2, "c": 4}
    assert l1.coverage(l1.find(prompt, 0.0).path, 5, live) == {"a": 5, "b": 2, "c": 4}
    assert l1.coverage(l1.find(prompt, 0.0).path, 9, lambda name, _: name != "a") == {"b": 2, "c": 4}


def test_retracted_coverage_ends_on_all_branches() -> None:
    """A holder that loses a chunk covers nothing behind it, whatever deeper snapshots of the same age say."""
    l1, prompt, branch = new(max_run=2), prompt_of(*range(6)), prompt_of(0, 1, 2, 7)
    learn(l1, prompt, 0.0, view(0, 2, 2, w=2, v=2), view(2, 2, 2, w=2, v=2), view(4, 2, 2, w=2))
    learn(l1, branch, 0.0, view(0, 2, 2, w=2, v=2), view(2, 1, 1, w=1, v=1), view(3, 1, 1, w=1))
    l1.retract(hashes_of(prompt)[:32], "w")
    for each in (prompt, branch):
        found = l1.find(each, 0.0)
        assert l1.coverage(found.path, found.chunks, live)["w"] == 1


def test_tokens_and_chains_are_kept_apart() -> None:
    """A prompt of tokens and a chain have a tree each, and one budget."""
    l1, prompt = new(), prompt_of(*range(4))
    chain = read_prompt(Chain.packed(hashes_of(prompt)), 2, 100)
    learn(l1, prompt)
    assert l1.find(chain, 0.0).chunks == 0
    l1.learn(chain, bytes(chain.view), 0, [view(0, 4, 4, w=4)], 0.0)
    assert (l1.find(chain, 0.0).chunks, l1.chunks, l1.nodes) == (4, 8, 2)
    l1.clear()
    assert (l1.chunks, l1.nodes, l1.bytes) == (0, 0, 0)


def test_a_cut_forgets_what_redis_does_not_have() -> None:
    """Cutting a prompt at a depth keeps what lies above it."""
    l1, prompt = new(), prompt_of(*range(6))
    learn(l1, prompt)
    l1.cut(prompt, 4)
    assert l1.find(prompt, 0.0).chunks == 4
    l1.cut(prompt, 0)
    assert l1.chunks == 0


def test_leaves_go_first_and_oldest_first() -> None:
    """Eviction takes leaves by age of use, and a parent only after its children."""
    l1 = new()
    for i, chunks in enumerate([(0, 1, 1), (0, 2, 2), (0, 3, 3)]):
        learn(l1, prompt_of(*chunks), float(i), view(0, 1, 1, w=1), view(1, 2, 2, w=2))
    l1.touch(l1.find(prompt_of(0, 1, 1), 3.0).path[-1], 3.0)
    order: list[list[int]] = []
    while l1.chunks:
        l1.max_bytes = l1.bytes - 1
        l1.shrink()
        order.append([l1.find(prompt_of(0, i, i), 0.0).chunks for i in (1, 2, 3)])
    assert order == [[3, 1, 3], [3, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert l1.evicted_chunks == 7


def test_hot_nodes_go_last() -> None:
    """A node with enough hits outlives younger ones that have fewer."""
    l1 = new(hot=3)
    learn(l1, prompt_of(1, 1), 0.0)
    for _ in range(3):
        l1.touch(l1.find(prompt_of(1, 1), 1.0).path[-1], 1.0)
    for i in range(2, 6):
        learn(l1, prompt_of(i, i), float(i))
    l1.max_bytes = l1.bytes // 5
    l1.shrink()
    assert [l1.find(prompt_of(i, i), 9.0).chunks for i in range(1, 6)] == [2, 0, 0, 0, 0]


def test_unpublished_prefixes_are_never_trusted() -> None:
    """What Redis could not be told is known here and asked for again."""
    l1, prompt = new(), prompt_of(1, 2, 3)
    l1.assume(prompt, hashes_of(prompt), HOLDER, 1)
    found = l1.find(prompt, 0.0)
    assert (found.chunks, found.fresh, found.resume) == (3, 0, 0)
    assert l1.coverage(found.path, 3, live) == {HOLDER: 3}
    assert l1.published_up_to(found, HOLDER, 1, 3) == 0


def test_a_publish_begins_where_redis_was_just_told() -> None:
    """The last node that Redis knows this holder and these blocks for is where a publish goes on."""
    l1, prompt = new(), prompt_of(*range(8))
    told = [view(0, 4, 4), view(4, 2, 2)]
    told = [each._replace(holders={HOLDER: (3, each.start + each.size)}) for each in told]
    learn(l1, prompt, 0.0, *told)
    found = l1.find(prompt, 0.0)
    assert l1.published_up_to(found, HOLDER, 3, 6) == 4
    assert l1.published_up_to(found, HOLDER, 3, 5) == 0
    assert l1.published_up_to(found, HOLDER, 4, 6) == 0
    assert l1.published_up_to(found, "w2/0@gpu", 3, 6) == 0
    assert l1.published_up_to(l1.find(prompt, 99.0), HOLDER, 3, 6) == 0


def test_the_hottest_come_first() -> None:
    """Candidates are the nodes with enough hits, here and in the cluster together, most hits first."""
    l1 = new()
    for i, hits in enumerate((1, 9, 4)):
        learn(l1, prompt_of(i, i), 0.0, view(0, 2, 2, w=2)._replace(hits=hits))
    assert [node.value.hits for node in l1.hottest(4) if node.value] == [9, 4]


@pytest.mark.parametrize("as_chains", [False, True])
@pytest.mark.parametrize(
    ("chunks", "fanout", "holders"),
    [(1, 4000, 1), (4, 4000, 1), (60, 1500, 1), (3, 3000, 4), (2, 400, 64)],
)
def test_the_budget_is_honest(chunks: int, fanout: int, holders: int, as_chains: bool) -> None:
    """The bytes that L1 says it takes are within a fifth of what is really allocated, in trees of different shapes."""
    rng = random.Random(4)
    prompts = [prompt_of(i % 50, *(rng.randrange(2**31) for _ in range(chunks))) for i in range(fanout)]
    hashes = [hashes_of(prompt) for prompt in prompts]
    if as_chains:
        prompts = [read_prompt(Chain.packed(packed), 2, 10_000_000) for packed in hashes]
    tracemalloc.start()
    try:
        l1 = new()
        before = tracemalloc.get_traced_memory()[0]
        for prompt, packed in zip(prompts, hashes, strict=True):
            told = [  # as they come out of a reply
                view(at, size, size)._replace(
                    holders={sys.intern(f"pod-{i}/0@gpu"): (1, at + size) for i in range(holders)}
                )
                for at, size in ((0, 1), (1, chunks))
            ]
            l1.learn(prompt, packed, 0, told, 1.0)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.8 < l1.bytes / taken < 1.2, f"L1 says {l1.bytes}, {taken} are taken: {taken / l1.nodes:.0f} a node"

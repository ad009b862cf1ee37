"""Publishing and finding, on every kind of server."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from distprefix import CacheTier, Chain, Holder, PrefixCacheOptimizer
from distprefix.errors import InvalidInputError, StaleEpochError
from tests.servers import Backend


def prompt(chunks: int, *, tail: int = 0) -> list[int]:
    """Tokens of so many chunks of 4; from chunk `tail` on (if it is not 0) they are others."""
    return [i if not tail or i < 4 * tail else i + 100_000 * tail for i in range(4 * chunks)]


def test_one_worker_publishes_and_another_finds(any_server: Backend) -> None:
    """What one worker publishes, another finds through Redis, with its holder and its remaining tokens."""
    hash_of_ten = any_server.open("w1").cache_prefix(prompt(10), range(100, 110))
    result = any_server.open("w2").find_longest_cache_hit([*prompt(10), 7, 7])
    assert (result.hit, result.matched_chunks, result.matched_tokens) == (True, 10, 40)
    assert (result.tier, result.holders) == (CacheTier.WARM, (Holder("w1/0@gpu", 10),))
    assert (result.remaining_tokens, result.block_ids) == ([7, 7], ())
    assert bool(result) is True
    assert result.entry is not None
    assert (result.entry.prefix_hash, result.entry.num_tokens) == (hash_of_ten, 40)


def test_every_form_of_a_prompt_names_the_same_prefix(any_server: Backend) -> None:
    """Lists, arrays, NumPy arrays and buffers of the same tokens find the same prefix, from L1 and from Redis."""
    writer = any_server.open("w1")
    tokens = [5, 70_000, 2**32 - 1, 0, *range(16)]
    writer.cache_prefix(tokens)
    forms = [tuple(tokens), array("I", tokens), np.array(tokens, np.uint32), array("I", tokens).tobytes()]
    for i, form in enumerate(forms):
        assert any_server.open(f"r{i}").find_longest_cache_hit(form).matched_chunks == 5
        assert writer.find_longest_cache_hit(form).tier is CacheTier.HOT


def test_a_miss_is_a_result(any_server: Backend) -> None:
    """A prompt that nobody published, and one shorter than a chunk, give a miss with everything remaining."""
    cache = any_server.open()
    result = cache.find_longest_cache_hit(prompt(3))
    assert (result.hit, result.matched_chunks, result.holders, result.tier, result.entry) == (False, 0, (), None, None)
    assert result.remaining_tokens == prompt(3)
    assert not result
    assert not cache.find_longest_cache_hit([1, 2]).hit


@pytest.mark.parametrize("length", [4, 5, 8, 9, 40])
def test_an_exact_hit_leaves_a_token_to_compute(any_server: Backend, length: int) -> None:
    """With the prompt's tokens less one as limit, a prompt that is cached whole leaves something, in every form."""
    tokens = prompt(10)[:length]
    any_server.open("w1").cache_prefix(tokens, range(length // 4))
    wanted = (length - 1) // 4
    chain = any_server.open("w2").chain_of(tokens)
    for form in (tokens, tuple(tokens), np.array(tokens, np.uint32), array("I", tokens).tobytes()):
        reader = any_server.open("w2")
        for _ in range(2):  # Redis answers, then L1
            result = reader.find_longest_cache_hit(form, max_cache_hit_length=length - 1)
            assert (result.hit, result.matched_chunks, result.matched_tokens) == (wanted > 0, wanted, 4 * wanted)
            assert len(result.remaining_tokens) == len(form) - 4 * wanted * (len(form) // length) > 0
            assert result.prompt is form
    result = reader.find_longest_cache_hit(chain, max_cache_hit_length=length - 1)
    assert (result.matched_chunks, result.remaining_tokens) == (wanted, chain[wanted:])
    assert reader.find_longest_cache_hit(tokens).matched_chunks == length // 4
    assert reader.find_longest_cache_hit(tokens, max_cache_hit_length=10**9).matched_chunks == length // 4


def test_a_limit_on_hits_is_kept(any_server: Backend) -> None:
    """Looking up again, waiting for a claim, and this worker's own blocks go by the limit too; 0 makes a miss."""
    cache = any_server.open("w1")
    hit = cache.find_longest_cache_hit(prompt(4), max_cache_hit_length=15)
    claim = hit.claim(30)
    cache.cache_prefix(prompt(4), [5, 6, 7, 8])
    assert (hit.again().matched_chunks, claim.wait(0).matched_chunks) == (3, 3)
    assert (hit.again().again().block_ids, hit.again().remaining_tokens) == ((5, 6, 7), prompt(4)[12:])
    assert cache.get_computed_blocks(prompt(4)) == [5, 6, 7, 8]
    assert cache.get_computed_blocks(prompt(4), max_cache_hit_length=15) == [5, 6, 7]
    assert not cache.find_longest_cache_hit(prompt(4), max_cache_hit_length=0)
    assert hit.again().claim(30).mine  # what is left to all is for all to compute
    for wrong in (-1, True, 1.5, "3"):
        with pytest.raises(InvalidInputError, match="max_cache_hit_length is"):
            cache.find_longest_cache_hit(prompt(4), max_cache_hit_length=wrong)  # pyright: ignore[reportArgumentType]


def test_a_shared_prefix_that_was_never_published_hits(any_server: Backend) -> None:
    """Two prompts that share a prefix which itself was never cached still hit on the shared full chunks."""
    writer = any_server.open("w1")
    writer.cache_prefix(prompt(8, tail=5))
    writer.cache_prefix(prompt(8))
    assert any_server.open("w2").find_longest_cache_hit(prompt(9, tail=6)).matched_chunks == 6
    assert any_server.open("w3").find_longest_cache_hit(prompt(5)).matched_chunks == 5


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63])
def test_a_match_that_ends_inside_a_run_is_exact(any_server: Backend, length: int) -> None:
    """A prompt that leaves a run, or ends, in its middle matches exactly the chunks it shares."""
    any_server.open("w1").cache_prefix(prompt(64), range(64))
    assert any_server.open("w2").find_longest_cache_hit(prompt(64, tail=length)).matched_chunks == length
    assert any_server.open("w3").find_longest_cache_hit(prompt(length)).matched_chunks == length


def test_block_ids_are_those_of_the_matched_chunks(any_server: Backend) -> None:
    """Block ids are exactly those of the matched chunks, in L1 and for a holder asked for by name."""
    writer = any_server.open("w1", max_run=8)
    writer.cache_prefix(prompt(20), range(500, 520))
    writer.cache_prefix(prompt(20, tail=11), [*range(500, 511), *range(700, 709)])
    asked = [*prompt(15, tail=11), 1]
    assert writer.find_longest_cache_hit(asked).block_ids == (*range(500, 511), *range(700, 704))
    assert writer.get_computed_blocks(asked) == [*range(500, 511), *range(700, 704)]
    reader = any_server.open("w2", max_run=8)
    assert reader.find_longest_cache_hit(asked, blocks_of="w1/0@gpu").block_ids == (*range(500, 511), *range(700, 704))
    assert reader.find_longest_cache_hit(prompt(9), blocks_of="w1/0@gpu").block_ids == tuple(range(500, 509))
    assert reader.find_longest_cache_hit(prompt(9), blocks_of="w9/0@gpu").block_ids == ()


def test_block_ids_end_where_the_holder_has_a_hole(any_server: Backend) -> None:
    """Block ids of a holder that lost chunks in the middle end there; those behind are never shifted forward."""
    one, other = any_server.open("w1", max_run=4), any_server.open("w2", max_run=4)
    one.cache_prefix(prompt(8), range(8))
    other.cache_prefix(prompt(8))
    one.remove_skipped_blocks([2])
    result = any_server.open("w3", max_run=4).find_longest_cache_hit(prompt(8), blocks_of="w1/0@gpu")
    assert (result.matched_chunks, result.block_ids) == (8, (0, 1))


def test_block_ids_of_an_older_epoch_are_not_told(any_server: Backend) -> None:
    """The block ids of a worker that has started anew since are not given, even when others hold the prefix."""
    any_server.open("w1").cache_prefix(prompt(4), range(4))
    any_server.open("w2").cache_prefix(prompt(4))
    any_server.open("w1")
    assert any_server.open("w3").find_longest_cache_hit(prompt(4), blocks_of="w1/0@gpu").block_ids == ()


def test_publishing_again_extends(any_server: Backend) -> None:
    """A longer prompt published later extends the shorter one, and a shorter one takes nothing back."""
    writer = any_server.open("w1")
    for chunks in (3, 7, 5):
        writer.cache_prefix(prompt(chunks), range(chunks))
    result = any_server.open("w2").find_longest_cache_hit(prompt(9), blocks_of="w1/0@gpu")
    assert (result.matched_chunks, result.block_ids) == (7, tuple(range(7)))


def test_each_holder_is_told_with_its_own_prefix(any_server: Backend) -> None:
    """A result lists every live holder with the leading chunks it has, longest first."""
    for worker, chunks in (("w1", 4), ("w2", 9), ("w3", 6)):
        any_server.open(worker).cache_prefix(prompt(chunks))
    result = any_server.open("w4").find_longest_cache_hit(prompt(12))
    assert result.holders == (Holder("w2/0@gpu", 9), Holder("w3/0@gpu", 6), Holder("w1/0@gpu", 4))
    assert result.matched_chunks == 9


def test_a_holder_must_have_the_prefix_from_the_root(any_server: Backend) -> None:
    """Holders whose leading runs do not join are not added up: nobody holds what two hold in pieces."""
    one, other = any_server.open("w1", max_run=4), any_server.open("w2", max_run=4)
    one.cache_prefix(prompt(12), range(12))
    other.cache_prefix(prompt(6))
    one.remove_skipped_blocks([4])
    assert any_server.open("w3", max_run=4).find_longest_cache_hit(prompt(12)).holders == (
        Holder("w2/0@gpu", 6),
        Holder("w1/0@gpu", 4),
    )


def test_coverage_of_a_restarted_worker_counts_for_nothing(any_server: Backend) -> None:
    """A worker that starts anew under the same id holds nothing until it publishes again."""
    first = any_server.open("w1")
    first.cache_prefix(prompt(8))
    second = any_server.open("w1")
    assert not second.find_longest_cache_hit(prompt(8)).hit
    assert not any_server.open("w2").find_longest_cache_hit(prompt(8)).hit
    second.cache_prefix(prompt(5))
    assert any_server.open("w3").find_longest_cache_hit(prompt(8)).matched_chunks == 5


def test_a_process_that_was_taken_over_cannot_publish(any_server: Backend) -> None:
    """The older of two processes with one worker id is refused where the newer one has published."""
    old, new = any_server.open("w1"), any_server.open("w1")
    new.cache_prefix(prompt(3))
    before = any_server.dump()
    with pytest.raises(StaleEpochError, match="taken over"):
        old.cache_prefix(prompt(6))
    assert any_server.dump() == before


def test_chains_stand_for_tokens(any_server: Backend) -> None:
    """A chain of opaque hashes is published and found like tokens, and what remains is a chain."""
    chain = Chain(bytes([i]) * 32 for i in range(9))
    any_server.open("w1").cache_prefix(chain[:6], range(6))
    result = any_server.open("w2").find_longest_cache_hit(chain)
    assert (result.matched_chunks, result.matched_tokens, result.remaining_tokens) == (6, 24, chain[6:])


def test_metadata_comes_back(any_server: Backend) -> None:
    """Metadata of a prompt is found with the node it ends in, by every worker."""
    any_server.open("w1").cache_prefix(prompt(3), metadata={"session": "a", "turn": 3})
    entry = any_server.open("w2").find_longest_cache_hit(prompt(3)).entry
    assert entry is not None
    assert entry.metadata == {"session": "a", "turn": 3}


def test_metadata_belongs_to_one_prompt(any_server: Backend) -> None:
    """Prompts that end in one another's runs keep theirs, and a match that ends elsewhere shows none."""
    cache, reader = any_server.open("w1"), any_server.open("w2", l1_ttl_s=0)
    cache.cache_prefix(prompt(6), metadata={"turn": 2})
    cache.cache_prefix(prompt(3), metadata={"turn": 1})
    cache.cache_prefix(prompt(9), metadata={"turn": 3})
    cache.cache_prefix(prompt(12))
    seen = [reader.find_longest_cache_hit(prompt(length)).entry for length in (2, 3, 5, 6, 9, 11, 12)]
    turns = [entry.metadata and entry.metadata["turn"] for entry in seen if entry]
    assert turns == [None, 1, None, 2, 3, None, None]
    assert reader.check_integrity().ok


def test_a_new_epoch_is_learned_from_replies(any_server: Backend) -> None:
    """A reader that sees a worker's new epoch counts nothing of older ones, before it reads the epochs again."""
    any_server.open("w1").cache_prefix([7] * 16)
    reader = any_server.open("w2", l1_ttl_s=0)
    assert reader.find_longest_cache_hit([7] * 16).hit
    any_server.open("w1").cache_prefix([8] * 16)
    assert reader.find_longest_cache_hit([8] * 16).hit
    assert not reader.find_longest_cache_hit([7] * 16).hit


def test_short_prompts_are_not_published(any_server: Backend) -> None:
    """A prompt below a chunk, or below min_prefix_length, publishes nothing, returns no hash and is counted."""
    cache = any_server.open(min_prefix_length=10)
    before = any_server.dump()
    hashes = [cache.cache_prefix(tokens) for tokens in ([1, 2, 3], cache.chain_of([1, 2, 3]), prompt(2))]
    assert hashes == ["", "", ""]
    assert cache.cache_prefix([1, 2, 3], [7]) == ""  # a trailing partial chunk may have a block
    assert not cache.update_prefix_state("", [])
    metrics = cache.get_metrics()
    assert (metrics["publishes_short"], metrics["publishes"], metrics["publishes_dropped"]) == (4, 0, 0)
    for tokens in ([1, 2, 3], cache.chain_of([1, 2, 3])):
        assert not cache.find_longest_cache_hit(tokens)
        assert (
            cache.store(tokens, []) == cache.find_stored(tokens) == cache.pin(tokens) == cache.load(tokens).chunks == 0
        )
    assert any_server.dump() == before
    assert cache.cache_prefix([*prompt(2), 1, 2])  # 10 tokens


def test_empty_prompts_and_unfit_blocks_are_refused(any_server: Backend) -> None:
    """Empty prompts, and blocks and metadata that do not fit, raise and change nothing, for short prompts as well."""
    cache = any_server.open()
    before = any_server.dump()
    with pytest.raises(InvalidInputError, match="metadata"):
        cache.cache_prefix([1], metadata={"a": object()})
    for tokens, blocks in (([], None), ([1, 2, 3], [1, 2]), (prompt(3), [1]), (prompt(3), [1, 2, 3, 4, 5])):
        with pytest.raises(InvalidInputError):
            cache.cache_prefix(tokens, blocks)
    with pytest.raises(InvalidInputError, match="empty"):
        cache.find_longest_cache_hit([])
    assert any_server.dump() == before
    assert cache.cache_prefix([*prompt(3), 1], [1, 2, 3, 4])


def test_prompts_have_no_limit_by_default(any_server: Backend) -> None:
    """A prompt of 20,000 tokens is published and found whole, and nothing is counted as cut."""
    writer = any_server.open("w1")
    writer.cache_prefix(prompt(5000))
    assert any_server.open("w2").find_longest_cache_hit(prompt(5000)).matched_tokens == 20_000
    assert writer.get_metrics()["tokens_cut"] == 0


def test_prompts_are_cut_at_their_limit(any_server: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """Tokens beyond max_prefix_length are not published nor looked up; they are counted, and one warning says so."""
    cache = any_server.open(max_prefix_length=18)
    cache.cache_prefix([*prompt(4), 1, 2, 3])  # as without the limit
    assert (cache.get_metrics()["tokens_cut"], caplog.messages) == (0, [])
    cache.cache_prefix(prompt(8), range(8))
    assert cache.get_metrics()["tokens_cut"] == 16
    assert any_server.open("w2").find_longest_cache_hit(prompt(8)).matched_chunks == 4
    assert cache.find_longest_cache_hit(Chain.packed(bytes(16 * 9))).remaining_tokens == Chain.packed(bytes(16 * 9))
    assert cache.get_metrics()["tokens_cut"] == 16 + 20
    (warning,) = caplog.messages
    assert "max_prefix_length is 18, and a prompt has 32 tokens" in warning
    any_server.open("w3", max_prefix_length=18).find_longest_cache_hit(prompt(8))
    assert len(caplog.messages) == 2  # each cache warns


def test_closed_caches_refuse(any_server: Backend) -> None:
    """A closed cache says so; closing it again does nothing."""
    cache: PrefixCacheOptimizer = any_server.open()
    cache.close()
    cache.close()
    with pytest.raises(Exception, match="closed"):
        cache.find_longest_cache_hit([1, 2, 3, 4])

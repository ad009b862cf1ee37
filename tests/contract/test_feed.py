"""The log that L1 follows: applied in order, resumed exactly, and never believed when anything may be missing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer, operations
from distprefix.errors import UnavailableError
from tests.contract.test_find import prompt
from tests.servers import Backend, Server


def told(cache: PrefixCacheOptimizer, tokens: list[int]) -> tuple[int, int]:
    """Chunks that a look-up reports, and the Redis calls that it took."""
    result = cache.find_longest_cache_hit(tokens)
    return result.matched_chunks, result.redis_calls


def feed_counts(cache: PrefixCacheOptimizer) -> tuple[int, int]:
    """Gaps and failures so far."""
    metrics = cache.get_metrics()
    return metrics["feed_gaps"], metrics["feed_failures"]


def pair(backend: Backend, **settings: Any) -> tuple[PrefixCacheOptimizer, PrefixCacheOptimizer]:
    """A writer that has published two prompts, and a reader whose L1 knows them and that has read the log."""
    writer, reader = backend.open("w1", **settings), backend.open("w2", **settings)
    writer.cache_prefix(prompt(6), range(6))
    writer.cache_prefix([9] * 20, range(10, 15))
    reader.catch_up()
    assert (told(reader, prompt(6))[0], told(reader, [9] * 20)[0]) == (6, 5)
    return writer, reader


def busy_log(cache: PrefixCacheOptimizer, entries: int) -> None:
    """At least so many entries in the log, by publishing a short prompt and taking it back."""
    for i in range(entries):
        cache.cache_prefix([7_000_000 + i] * 4, [999])
        cache.remove_skipped_blocks([999])


def save(backend: Backend) -> dict[bytes, bytes]:
    """The whole shard as a backup has it."""
    admin: Any = backend.admin
    return {key: admin.dump(key) for key in admin.scan_iter(match=f"{backend.keys.base}*", count=1000)}


def restore(backend: Backend, backup: dict[bytes, bytes]) -> None:
    """Put a backup in the place of the shard."""
    admin: Any = backend.admin
    admin.delete(*save(backend))
    for key, value in backup.items():
        admin.restore(key, 0, value)


def test_entries_are_applied_in_order(any_server: Backend) -> None:
    """A split, then a cut below it, then its removal: after each poll L1 has what is there, without a Redis call."""
    writer, reader = pair(any_server, max_run=8)
    writer.cache_prefix(prompt(6, tail=3), range(20, 26))
    writer.remove_skipped_blocks([5])
    reader.catch_up()
    assert told(reader, prompt(5)) == (5, 0)
    assert told(reader, prompt(6))[0] == 5
    writer.remove_skipped_blocks([3])
    writer.cache_prefix(prompt(4), [0, 1, 2, 33])
    writer.remove_skipped_blocks([0])
    reader.catch_up()
    assert told(reader, prompt(6))[0] == 0
    assert told(reader, [9] * 20) == (5, 0)
    assert feed_counts(reader) == (0, 0)


def test_an_entry_is_applied_once(any_server: Backend) -> None:
    """A poll with nothing new applies nothing, and one after a removal applies just that."""
    writer, reader = pair(any_server)
    for _ in range(3):
        writer.remove_skipped_blocks([14])
        writer.cache_prefix([9] * 20, range(10, 15))
        reader.catch_up()
        before = reader.get_metrics()["feed_entries"]
        reader.catch_up()
        assert reader.get_metrics()["feed_entries"] == before
    written: Any = any_server.admin.xlen(any_server.keys.log)
    assert reader.get_metrics()["feed_entries"] == written
    assert feed_counts(reader) == (0, 0)


def test_what_was_learned_before_the_first_poll_is_asked_for_again(any_server: Backend) -> None:
    """Who begins to read the log does not trust what it learned before: removals since then may not be in it."""
    writer, reader = any_server.open("w1"), any_server.open("w2")
    writer.cache_prefix(prompt(6), range(6))
    assert told(reader, prompt(6))[0] == 6
    writer.remove_skipped_blocks([2])
    assert reader.catch_up()
    assert told(reader, prompt(6))[0] == 2


def test_what_was_learned_between_a_gap_and_the_new_beginning_is_asked_for_again(
    any_server: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a gap, a look-up may learn something that goes before reading begins anew: L1 does not keep it."""
    writer, reader = pair(any_server)
    admin: Any = any_server.admin
    admin.hincrby(any_server.keys.meta, "log", 7)
    publish, pages = reader._state.link.publish, list[Any]()

    def late(operation: Any, deadline: float | None = None) -> Any:
        pages.append(operation)
        if len(pages) == 2:
            assert told(reader, prompt(6))[0] == 6
            writer.remove_skipped_blocks([2])
        return publish(operation, deadline)

    monkeypatch.setattr(reader._state.link, "publish", late)
    reader.catch_up()
    assert told(reader, prompt(6))[0] == 2


@pytest.mark.parametrize("empty", [False, True])
def test_resumed_after_redis_was_away(own_server: Server, empty: bool) -> None:
    """A frozen server costs nothing but time, one that came back empty makes L1 forget; neither makes a poll raise."""
    settings: dict[str, Any] = {"chunk_size": 4, "touch_interval_s": 0, "feed_interval_s": 0, "breaker_failures": 1000}
    config = PrefixCacheConfig(url=own_server.url, worker_id="w1", publish_timeout_s=0.3, l1_ttl_s=600.0, **settings)
    with PrefixCacheOptimizer(config) as writer, PrefixCacheOptimizer(replace(config, worker_id="w2")) as reader:
        writer.cache_prefix(prompt(6), range(6))
        writer.cache_prefix([9] * 20, range(10, 15))
        reader.catch_up()
        assert told(reader, prompt(6))[0] == 6
        writer.remove_skipped_blocks([5])
        own_server.freeze()
        began = time.monotonic()
        assert not reader.catch_up()
        assert time.monotonic() - began < 2
        assert told(reader, prompt(6))[0] == 6
        if empty:
            own_server.restart()
        else:
            own_server.thaw()
        assert reader.catch_up()
        if empty:
            assert (reader.get_metrics()["l1_chunks"], feed_counts(reader)) == (0, (1, 1))
            writer.flush()
            reader.flush()
            writer.cache_prefix(prompt(6), range(6))
            assert reader.catch_up()
            assert (told(reader, prompt(6)), told(reader, prompt(6))) == ((6, 1), (6, 0))
            assert feed_counts(reader) == (1, 1)
        else:
            assert feed_counts(reader) == (0, 1)
            assert told(reader, prompt(5)) == (5, 0)
            assert told(reader, prompt(6))[0] == 5


def test_a_page_lost_in_the_middle_is_read_again(real_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """When Redis fails between two pages, the next poll goes on behind the first: nothing is missed or read twice."""
    writer, reader = pair(real_server)
    busy_log(writer, 1200)
    writer.remove_skipped_blocks([3])
    publish, pages = reader._state.link.publish, list[Any]()

    def fail_once(operation: Any, deadline: float | None = None) -> Any:
        pages.append(operation)
        if len(pages) == 2:
            raise UnavailableError("no answer in time")
        return publish(operation, deadline)

    monkeypatch.setattr(reader._state.link, "publish", fail_once)
    before = reader.get_metrics()["feed_entries"]
    assert not reader.catch_up()
    assert reader.get_metrics()["feed_entries"] - before in (999, 1000)
    assert reader.catch_up()
    assert told(reader, prompt(6))[0] == 3
    assert reader.get_metrics()["feed_entries"] - before == 1201
    assert feed_counts(reader) == (0, 1)


def test_more_entries_than_a_page(real_server: Backend) -> None:
    """Thousands of entries at once are read page by page in one poll, and the last of them counts."""
    writer, reader = pair(real_server)
    busy_log(writer, 2500)
    writer.remove_skipped_blocks([3])
    calls = reader.get_metrics()["redis_calls_publish"]
    assert reader.catch_up()
    assert told(reader, prompt(6))[0] == 3
    assert told(reader, [9] * 20) == (5, 0)
    assert reader.get_metrics()["redis_calls_publish"] - calls == 3
    assert feed_counts(reader) == (0, 0)


@pytest.mark.parametrize("entries", [998, 999, 1000, 1998])
def test_pages_that_are_just_full(real_server: Backend, entries: int) -> None:
    """Where a page ends makes no difference."""
    writer, reader = pair(real_server)
    writer.remove_skipped_blocks([14])
    reader.catch_up()
    busy_log(writer, entries - 1)
    writer.remove_skipped_blocks([3])
    before = reader.get_metrics()["feed_entries"]
    assert reader.catch_up()
    assert reader.get_metrics()["feed_entries"] - before == entries
    assert told(reader, prompt(6))[0] == 3
    assert feed_counts(reader) == (0, 0)


@pytest.mark.parametrize("left", [0, 1, 5])
def test_missed_entries_make_l1_forget(any_server: Backend, left: int) -> None:
    """When the log was cut before it was read, L1 forgets everything, once, and then follows again."""
    writer, reader = pair(any_server)
    writer.remove_skipped_blocks([14])
    reader.catch_up()
    admin: Any = any_server.admin
    busy_log(writer, 10)
    writer.remove_skipped_blocks([3])
    admin.xtrim(any_server.keys.log, maxlen=left, approximate=False)
    for _ in range(3):
        reader.catch_up()
    assert (reader.get_metrics()["l1_chunks"], feed_counts(reader)) == (0, (1, 0))
    assert told(reader, prompt(6))[0] == 3
    writer.remove_skipped_blocks([1])
    reader.catch_up()
    assert told(reader, prompt(6))[0] == 1
    assert feed_counts(reader) == (1, 0)


def test_a_log_cut_behind_the_reader_is_no_gap(any_server: Backend) -> None:
    """Entries that were read already may go, as long as the last one read is still there."""
    writer, reader = pair(any_server)
    busy_log(writer, 5)
    reader.catch_up()
    any_server.admin.xtrim(any_server.keys.log, maxlen=1, approximate=False)
    writer.remove_skipped_blocks([3])
    reader.catch_up()
    assert (told(reader, prompt(6))[0], told(reader, [9] * 20), feed_counts(reader)) == (3, (5, 0), (0, 0))


@pytest.mark.parametrize("again", ["nobody", "other content", "same number of entries"])
def test_flushed(any_server: Backend, again: str) -> None:
    """After FLUSHALL, or what is like it for one namespace, L1 forgets, whatever was published since."""
    writer, reader = pair(any_server)
    busy_log(writer, 3)
    reader.catch_up()
    number: Any = any_server.admin.hget(any_server.keys.meta, "log")
    any_server.admin.delete(*save_names(any_server), *any_server.keys.own)
    if again != "nobody":
        writer.flush()
        writer.cache_prefix([5] * 40, range(50, 60))
        if again == "same number of entries":
            busy_log(writer, int(number))
            assert any_server.admin.hget(any_server.keys.meta, "log") == number
    assert reader.catch_up()
    assert feed_counts(reader) == (1, 0)
    reader.flush()
    assert [told(reader, tokens)[0] for tokens in (prompt(6), [9] * 20)] == [0, 0]
    writer.flush()
    writer.cache_prefix(prompt(6), range(6))
    reader.catch_up()
    assert told(reader, prompt(6))[0] == 6
    writer.remove_skipped_blocks([3])
    reader.catch_up()
    assert told(reader, prompt(6))[0] == 3


def save_names(backend: Backend) -> list[bytes]:
    """Every key of the shard."""
    admin: Any = backend.admin
    return list(admin.scan_iter(match=f"{backend.keys.base}*", count=1000))


@pytest.mark.parametrize("since", ["nothing", "fewer entries", "as many entries", "more entries"])
def test_older_data_restored(real_server: Backend, since: str) -> None:
    """A backup in the place of newer data makes L1 forget, also when the log has gone on to the same number since."""
    writer, reader = pair(real_server)
    busy_log(writer, 2)
    backup = save(real_server)
    writer.remove_skipped_blocks([13])
    writer.cache_prefix([8] * 20, range(20, 25))
    busy_log(writer, 4)
    reader.catch_up()
    assert told(reader, [8] * 20)[0] == 5
    restore(real_server, backup)
    other = real_server.open("w3")
    busy_log(other, {"nothing": 0, "fewer entries": 2, "as many entries": 5, "more entries": 9}[since])
    if since == "as many entries":
        number: Any = real_server.admin.hget(real_server.keys.meta, "log")
        assert int(number) == reader.get_metrics()["feed_entries"]
    for _ in range(3):
        assert reader.catch_up()
    assert feed_counts(reader) == (1, 0)
    assert [told(reader, tokens)[0] for tokens in ([8] * 20, prompt(6), [9] * 20)] == [0, 6, 5]
    assert other.check_integrity().ok


@pytest.mark.parametrize("part", ["meta", "log"])
def test_only_a_part_restored(real_server: Backend, part: str) -> None:
    """When count and log are of different times, L1 forgets once and follows again: it does not stay empty."""
    writer, reader = pair(real_server)
    busy_log(writer, 2)
    backup = save(real_server)
    busy_log(writer, 4)
    reader.catch_up()
    key = getattr(real_server.keys, part).encode()
    real_server.admin.restore(key, 0, backup[key], replace=True)
    for _ in range(3):
        assert reader.catch_up()
    assert feed_counts(reader) == (1, 0)
    assert told(reader, prompt(6))[0] == 6
    writer.remove_skipped_blocks([3])
    assert reader.catch_up()
    assert (told(reader, prompt(6))[0], feed_counts(reader)) == (3, (1, 0))


@pytest.mark.parametrize("seconds", [-86_400.0, 86_400.0])
def test_clocks_that_jump(any_server: Backend, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Clocks of workers may jump by a day: entries are told apart by the server's order, not by time."""
    writer, reader = pair(any_server)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + seconds)
    writer.remove_skipped_blocks([3])
    reader.catch_up()
    assert told(reader, prompt(6))[0] == 3
    writer.cache_prefix(prompt(6), range(6))
    monkeypatch.setattr(time, "time", now)
    writer.remove_skipped_blocks([2])
    reader.catch_up()
    assert (told(reader, prompt(6))[0], told(reader, [9] * 20), feed_counts(reader)) == (2, (5, 0), (0, 0))


@pytest.mark.parametrize(
    "fields",
    [
        {"n": "x", "removed": "00" * 16},
        {"hello": "world"},
        {"n": "NEXT", "removed": "no hash"},
        {"n": "NEXT", "trimmed": "00" * 16},
        {"n": "NEXT", "trimmed": "KNOWN", "size": "many"},
        {"n": "NEXT", "split": "KNOWN"},
        {"n": "NEXT", "removed": b"\xff\xfe"},
        {"n": "-1", "removed": "00" * 16},
        {"n": "99999999999999999999999", "removed": "00" * 16},
    ],
    ids=repr,
)
def test_entries_of_another_hand(any_server: Backend, fields: dict[str, Any]) -> None:
    """An entry that makes no sense never raises: L1 forgets and follows again as soon as a sound entry comes."""
    writer, reader = pair(any_server)
    admin: Any = any_server.admin
    head = admin.zrange(any_server.keys.leaves, 0, 0)[0].decode()
    writer.remove_skipped_blocks([4])  # applied before the bad one
    generation = reader._state.feed.generation
    if fields.get("n") == "NEXT":
        fields = {**fields, "n": admin.hincrby(any_server.keys.meta, "log", 1)}
    admin.xadd(any_server.keys.log, {name: head if value == "KNOWN" else value for name, value in fields.items()})
    for _ in range(3):
        reader.catch_up()
    assert reader._state.feed.generation > generation
    assert told(reader, prompt(6))[0] == 4
    writer.remove_skipped_blocks([3])
    assert reader.catch_up()
    assert told(reader, prompt(6))[0] == 3
    gaps, failures = feed_counts(reader)
    writer.remove_skipped_blocks([2])
    assert reader.catch_up()
    assert (told(reader, prompt(6))[0], feed_counts(reader)) == (2, (gaps, failures))
    assert gaps + failures > 0


def test_unknown_kinds_of_entries_are_passed_over(any_server: Backend) -> None:
    """What a newer version tells in its own words is no gap, as long as it is numbered."""
    writer, reader = pair(any_server)
    admin: Any = any_server.admin
    number = admin.hincrby(any_server.keys.meta, "log", 1)
    admin.xadd(any_server.keys.log, {"n": number, "moved": "00" * 16, "to": "warm"})
    writer.remove_skipped_blocks([3])
    assert reader.catch_up()
    assert (told(reader, prompt(6))[0], told(reader, [9] * 20), feed_counts(reader)) == (3, (5, 0), (0, 0))


def test_a_log_of_another_type(any_server: Backend) -> None:
    """When the log is no stream, polls fail and are counted, and what L1 has goes on to answer."""
    _, reader = pair(any_server)
    any_server.admin.delete(any_server.keys.log)
    any_server.admin.set(any_server.keys.log, "no stream")
    assert not reader.catch_up()
    assert (told(reader, prompt(6)), feed_counts(reader)) == ((6, 0), (0, 1))


@pytest.mark.parametrize("revoked", ["removed", "trimmed", "changed", "gap"])
def test_a_reply_that_the_log_overtook_is_not_trusted(
    any_server: Backend, monkeypatch: pytest.MonkeyPatch, revoked: str
) -> None:
    """When something is revoked while a look-up's reply is on its way, L1 asks again in place of trusting the reply."""
    writer, other, reader = any_server.open("w1"), any_server.open("w3"), any_server.open("w2")
    writer.cache_prefix(prompt(6), range(6))
    if revoked == "changed":
        other.cache_prefix(prompt(2))
    reader.catch_up()
    walk: Callable[..., Any] = reader._state.link.look_up

    def overtaken(operation: Any, deadline: float) -> Any:
        reply = walk(operation, deadline)
        writer.remove_skipped_blocks([0 if revoked == "removed" else 3])
        if revoked == "gap":
            any_server.admin.hincrby(any_server.keys.meta, "log", 7)
        reader.catch_up()
        return reply

    monkeypatch.setattr(reader._state.link, "look_up", overtaken)
    told(reader, prompt(6))
    monkeypatch.setattr(reader._state.link, "look_up", walk)
    matched, calls = told(reader, prompt(6))
    assert (matched, calls) == (0 if revoked == "removed" else 3, 1)


def test_a_publish_that_the_log_overtook_is_not_trusted(any_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what a publish is told of the path."""
    writer, reader = any_server.open("w1"), any_server.open("w2")
    writer.cache_prefix(prompt(6), range(6))
    reader.catch_up()
    publish: Callable[..., Any] = reader._state.link.publish

    def overtaken(operation: Any, deadline: float | None = None) -> Any:
        reply = publish(operation, deadline)
        if isinstance(reply, operations.Published):
            monkeypatch.setattr(reader._state.link, "publish", publish)
            writer.remove_skipped_blocks([3])
            reader.catch_up()
        return reply

    monkeypatch.setattr(reader._state.link, "publish", overtaken)
    reader.cache_prefix(prompt(6))
    result = reader.find_longest_cache_hit(prompt(6))
    assert (dict(result.holders), result.redis_calls) == ({"w2/0@gpu": 6, "w1/0@gpu": 3}, 1)

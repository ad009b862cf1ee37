"""The conformance cases: messages of engines, and what the shared tree answers afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distprefix.events.frames import Frame
from tests.followers import Kept, follow, holders
from tests.servers import Backend

CASES = sorted((Path(__file__).parents[1] / "conformance").glob("*.json"))


def _frames(found: list[dict[str, Any]]) -> list[Frame]:
    return [Frame(each["seq"], bytes.fromhex(each["payload_hex"])) for each in found]


def _expected(query: dict[str, Any]) -> dict[str, int]:
    return {f"w/0@{medium}": chunks for medium, chunks in query["holders"].items()}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_tree_answers_what_the_case_says(path: Path, any_server: Backend) -> None:
    """After the messages of a case, each of its queries is answered as it says, also by a follower that took over."""
    case = json.loads(path.read_text())
    settings = {"chunk_size": case["chunk_size"], "kind": case["engine"]["format"]}
    settings["is_plain"] = case["engine"].get("plain", False)
    kept = Kept(_frames(case["replay"]) if "replay" in case else None)
    follower, journal = follow(any_server, kept, **settings)
    assert follower.begin()
    for frame in _frames(case["frames"]):
        follower.take([frame])
    reader = any_server.open("reader", chunk_size=case["chunk_size"])
    for query in case["queries"]:
        extras = {name: query[name] for name in ("lora_name", "cache_salt")}
        assert holders(reader, query["tokens"], **extras) == _expected(query), query
    assert reader.check_integrity().problems == []
    if "replay" in case and case["frames"][-1] in case["replay"]:
        journal.resign()
        second, _ = follow(any_server, kept, **settings)
        assert second.begin()
        for query in case["queries"]:
            extras = {name: query[name] for name in ("lora_name", "cache_salt")}
            assert holders(reader, query["tokens"], **extras) == _expected(query), query


def test_a_message_that_cannot_be_read_may_have_told_of_anything(real_server: Backend) -> None:
    """What was held before it counts no more, what comes after it does, and it is counted."""
    case = json.loads((CASES[0].parent / "maps.json").read_text())
    frames = _frames(case["frames"])
    follower, _ = follow(real_server, Kept(), chunk_size=case["chunk_size"])
    assert follower.begin()
    follower.take(frames)
    before = follower.epoch
    follower.take([Frame(frames[-1].seq + 1, b"nonsense")])
    assert follower.epoch > before
    assert (follower.counts["messages_unreadable"], len(follower.holdings)) == (1, 0)
    reader = real_server.open("reader", chunk_size=case["chunk_size"])
    assert all(holders(reader, query["tokens"]) == {} for query in case["queries"])
    follower.take([Frame(frames[0].seq + len(frames) + 1, frames[0].payload)])
    assert len(follower.holdings)

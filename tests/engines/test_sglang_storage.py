"""SGLang's storage backend: with SGLang's own factory, interface and host memory, in its environment."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.orders import Process, opened, tidied
from tests.servers import Backend, Server

ABSTRACT = ["batch_get", "batch_set", "exists", "get", "set"]
LAYOUTS = ("page_first", "layer_first", "page_first_direct")


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    """One process for all tests."""
    yield from opened("DISTPREFIX_SGLANG_PYTHON", "sglang_storage.py", "tests/engines/install_sglang.sh")


@pytest.fixture
def sglang(process: Process) -> Iterator[Process]:
    """The process, with nothing open before and after."""
    yield from tidied(process)


def keys(count: int, seed: str = "") -> list[str]:
    """A chain of page keys, as SGLang hashes them."""
    found = [hashlib.sha256(seed.encode()).hexdigest()]
    while len(found) < count:
        found.append(hashlib.sha256(found[-1].encode()).hexdigest())
    return found


def both(sglang: Process, backend: Backend, **more: Any) -> None:
    """Two servers on one Redis, the first with random KV in its host memory."""
    extra = {"url": backend.url, "namespace": backend.namespace, "lookup_timeout_s": 5, **more.pop("extra", {})}
    for name in ("a", "b"):
        sglang.tell("open", name=name, extra=extra, **more)
        sglang.tell("call", name=name, method="batch_exists", keys=keys(1))  # opens it
    sglang.tell("fill", name="a", seed=7)
    sglang.tell("fill", name="b", seed=8)


def result(sglang: Process, name: str, method: str, *arguments: Any, prefix: list[str] | None = None) -> Any:
    """What a method of interface v1 gives."""
    named = dict(zip(("keys", "pages"), arguments, strict=False))
    return sglang.tell("call", name=name, method=method, **named, prefix=prefix)["result"]


def test_interface_is_the_one_we_know(sglang: Process) -> None:
    """SGLang's abstract methods are those we have, and every one of ours takes what theirs takes, in that order."""
    found = sglang.tell("interface")
    assert found["abstract"] == ABSTRACT
    for name, parameters in found["methods"].items():
        assert found["ours"][name] == parameters, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_go_from_one_server_to_the_other(sglang: Process, real_server: Backend, layout: str) -> None:
    """What one server stored another one finds and loads, byte for byte, to other places of its host memory."""
    both(sglang, real_server, layout=layout)
    chain = keys(6)
    assert result(sglang, "a", "batch_set_v1", chain, [0, 1, 2, 3, 4, 5], prefix=[]) == [True] * 6
    assert result(sglang, "b", "batch_exists", [*chain, *keys(2, "other")]) == 6
    assert result(sglang, "b", "batch_get_v1", chain, [9, 8, 7, 6, 5, 4], prefix=[]) == [True] * 6
    pairs = [[i, 9 - i] for i in range(6)]
    assert sglang.tell("same", one="a", other="b", pages=pairs)["same"] == [True] * 6
    assert sglang.tell("said")["said"] == []


def test_look_up_is_one_call(sglang: Process, real_server: Backend) -> None:
    """However many pages a look-up names, with those before them, Redis runs one script."""
    both(sglang, real_server)
    chain = keys(12)
    result(sglang, "a", "batch_set_v1", chain, list(range(12)), prefix=[])
    before = real_server.script_calls()
    assert result(sglang, "b", "batch_exists", chain[4:], prefix=chain[:4]) == 8
    assert real_server.script_calls() == before + 1


def test_batches_go_on_where_the_last_one_ended(sglang: Process, real_server: Backend) -> None:
    """Pages stored and loaded batch by batch, each with its prefix keys, are one chain."""
    both(sglang, real_server)
    chain = keys(9)
    for at in range(0, 9, 3):
        batch, pages = chain[at : at + 3], list(range(at, at + 3))
        assert result(sglang, "a", "batch_set_v1", batch, pages, prefix=chain[:at]) == [True] * 3
        assert result(sglang, "b", "batch_exists", batch, prefix=chain[:at]) == 3
        assert result(sglang, "b", "batch_get_v1", batch, pages, prefix=chain[:at]) == [True] * 3
    assert sglang.tell("same", one="a", other="b", pages=[[i, i] for i in range(9)])["same"] == [True] * 9


def test_load_ends_at_the_first_page_that_is_gone(sglang: Process, real_server: Backend) -> None:
    """Pages behind one that is missing are not loaded, and the host memory of those before is right."""
    both(sglang, real_server)
    chain = keys(5)
    result(sglang, "a", "batch_set_v1", chain[:3], [0, 1, 2], prefix=[])
    assert result(sglang, "b", "batch_get_v1", chain, [0, 1, 2, 3, 4], prefix=[]) == [True] * 3 + [False] * 2
    assert sglang.tell("same", one="a", other="b", pages=[[0, 0], [2, 2], [3, 3]])["same"] == [True, True, False]


def test_a_page_without_its_prefix_is_a_miss_and_counted(sglang: Process, real_server: Backend) -> None:
    """Without prefix keys nothing is stored in the wrong place; what to set is said once, in words."""
    both(sglang, real_server)
    chain = keys(4)
    for _ in range(2):
        assert result(sglang, "a", "batch_set_v1", chain[2:], [0, 1]) == [False, False]
    assert sglang.tell("stats", name="a")["counts"]["pages_without_chain"] == 4
    (line,) = sglang.tell("said")["said"]
    assert "hicache_storage_pass_prefix_keys" in line


def test_generic_pages_find_their_chain(sglang: Process, real_server: Backend) -> None:
    """The generic page path names no prefix: the look-up before it told, and bytes come through."""
    both(sglang, real_server)
    chain = keys(6)
    for name in ("a", "b"):
        assert result(sglang, name, "batch_exists", chain[:3], prefix=[]) == 0
        assert result(sglang, name, "batch_exists", chain[3:], prefix=chain[:3]) == 0
    assert sglang.tell("generic", name="a", method="batch_set", keys=chain[:3], pages=[0, 1, 2])["result"]
    assert sglang.tell("generic", name="a", method="batch_set", keys=chain[3:], pages=[3, 4, 5])["result"]
    loaded = sglang.tell("generic", name="b", method="batch_get", keys=chain[3:], pages=[3, 4, 5])["result"]
    assert loaded == [True] * 3
    assert sglang.tell("same", one="a", other="b", pages=[[3, 3], [5, 5]])["same"] == [True, True]


@pytest.mark.parametrize(
    "other",
    [
        {"model": "tiny-finetuned"},
        {"layout": "layer_first"},
        {"heads": 4},
        {"tp_rank": 1, "tp_size": 2},
        {"pp_rank": 1, "pp_size": 2},
        {"attn_cp_rank": 1, "attn_cp_size": 2},
        {"extra": {"salt": "tenant"}},
        {"extra": {"weights": "r2"}},
    ],
)
def test_other_kv_is_never_found(sglang: Process, real_server: Backend, other: dict[str, Any]) -> None:
    """A server whose KV differs in anything finds nothing under the same keys."""
    extra = {"url": real_server.url, "namespace": real_server.namespace, "lookup_timeout_s": 5}
    sglang.tell("open", name="a", extra=extra)
    sglang.tell("open", name="b", **{**other, "extra": {**extra, **other.get("extra", {})}})
    assert all(result(sglang, "a", "batch_set_v1", keys(3), [0, 1, 2], prefix=[]))
    assert result(sglang, "b", "batch_exists", keys(3)) == 0
    assert sglang.tell("stats", name="b")["counts"]["connected"] == 1


def test_ranks_of_mla_share_and_one_writes(sglang: Process, real_server: Backend) -> None:
    """Of ranks with the same latent KV one writes, at any tensor-parallel size, and all read."""
    extra = {"url": real_server.url, "namespace": real_server.namespace, "lookup_timeout_s": 5}
    sglang.tell("open", name="a", extra=extra, is_mla_model=True, tp_rank=0, tp_size=4, latent=True)
    sglang.tell("open", name="b", extra=extra, is_mla_model=True, tp_rank=1, tp_size=2, latent=True)
    assert result(sglang, "b", "batch_set_v1", keys(3, "b"), [0, 1, 2], prefix=[]) == [True] * 3
    assert result(sglang, "b", "batch_exists", keys(3, "b")) == 0
    assert result(sglang, "a", "batch_set_v1", keys(3), [0, 1, 2], prefix=[]) == [True] * 3
    assert result(sglang, "b", "batch_exists", keys(3)) == 3


def test_pools_have_their_own_pages(sglang: Process, real_server: Backend) -> None:
    """Interface v2: every pool's pages come back; one that has fewer shortens the hit, as its policy says."""
    both(sglang, real_server, sidecars=("indexer", "swa"))
    chain = keys(6)
    result(sglang, "a", "batch_set_v1", chain, list(range(6)), prefix=[])
    whole = {"pool": "indexer", "keys": chain[:5], "pages": [0, 1, 2, 3, 4]}
    assert sglang.tell("v2", name="a", method="batch_set_v2", transfers=[whole], prefix=[])["result"] == {
        "indexer": [True] * 5
    }
    tail = {"pool": "swa", "keys": chain[2:4], "pages": [2, 3], "policy": "trailing_pages"}
    stored = sglang.tell("v2", name="a", method="batch_set_v2", transfers=[tail], prefix=chain[:2])
    assert stored["result"] == {"swa": [True] * 2}

    asked = [{"pool": "indexer"}, {"pool": "swa", "keys": chain[:2], "policy": "trailing_pages"}]
    found = sglang.tell("v2", name="b", method="batch_exists_v2", transfers=asked, keys=chain, prefix=None)
    assert found == {"pages": 4, "hits": {"kv": 6, "indexer": 5, "swa": 4}, "restorable": [4]}

    loaded = sglang.tell("v2", name="b", method="batch_get_v2", transfers=[tail], prefix=chain[:2])
    assert loaded["result"] == {"swa": [True] * 2}
    assert sglang.tell("same", one="a", other="b", pages=[[2, 2], [3, 3]], pool="swa")["same"] == [True, True]
    short = {"pool": "indexer", "keys": chain[3:], "pages": [3, 4, 5]}
    loaded = sglang.tell("v2", name="b", method="batch_get_v2", transfers=[short], prefix=chain[:3])
    assert loaded["result"] == {"indexer": [True, True, False]}
    assert sglang.tell("same", one="a", other="b", pages=[[3, 3], [4, 4]], pool="indexer")["same"] == [True, True]


def test_block_groups_never_shorten_the_hit(sglang: Process, real_server: Backend) -> None:
    """A pool of block groups tells what its leading whole groups cover, and the KV's hit stays what it is."""
    both(sglang, real_server, sidecars=("swa",))
    chain = keys(8)
    result(sglang, "a", "batch_set_v1", chain, list(range(8)), prefix=[])
    groups = [chain[2], chain[3], chain[6], chain[7]]
    told = {"pool": "swa", "keys": groups[:2], "pages": [2, 3], "policy": "block_groups"}
    sglang.tell("v2", name="a", method="batch_set_v2", transfers=[told], prefix=[])
    asked = {"pool": "swa", "keys": groups, "policy": "block_groups", "block_pages": 4, "group_pages": 2}
    found = sglang.tell("v2", name="b", method="batch_exists_v2", transfers=[asked], keys=chain)
    assert (found["pages"], found["hits"]) == (8, {"kv": 8, "swa": 4})


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"url": "redis://localhost", "naemspace": "x"}, "unknown setting 'naemspace'"),
        ({"url": "redis://localhost", "payload_codec": "no"}, "payload_codec"),
        ({}, "url is missing"),
    ],
)
def test_wrong_settings_are_refused_at_the_start(sglang: Process, extra: dict[str, Any], words: str) -> None:
    """A setting that is unknown, wrong or missing is named when the storage is made."""
    with pytest.raises(RuntimeError, match=words):
        sglang.tell("open", name="a", extra=extra)


def test_a_sick_redis_is_a_miss_in_time(sglang: Process, own_server: Server) -> None:
    """Frozen, wiped or killed: misses by the deadline, one warning, nothing raised; then all works again."""
    extra = {"url": own_server.url, "lookup_timeout_s": 0.5, "payload_timeout_s": 1.0}
    for name in ("a", "b"):
        sglang.tell("open", name=name, extra=extra)
        result(sglang, name, "batch_exists", keys(1))
    chain = keys(4)
    assert all(result(sglang, "a", "batch_set_v1", chain, [0, 1, 2, 3], prefix=[]))
    own_server.freeze()
    for method, most in (("batch_exists", 1.5), ("batch_get_v1", 4.0), ("batch_set_v1", 4.0)):
        pages = [] if method == "batch_exists" else [[0, 1, 2, 3]]
        arguments = dict(zip(("keys", "pages"), [chain, *pages], strict=False))
        answer = sglang.tell("call", name="a", method=method, prefix=[], **arguments)
        assert not answer["result"] or not any(answer["result"])
        assert answer["s"] < most, method
    own_server.thaw()
    _again(sglang, chain)
    own_server.restart()
    _again(sglang, chain)
    own_server.kill()
    assert result(sglang, "a", "batch_exists", chain) == 0
    assert result(sglang, "b", "batch_get_v1", chain, [0, 1, 2, 3], prefix=[]) == [False] * 4
    assert not sglang.tell("clear", name="a")["result"]
    said = [line for line in sglang.tell("said")["said"] if "KV is not shared for now" in line]
    assert len(said) <= 2, said  # one each


def _again(sglang: Process, chain: list[str]) -> None:
    """It works again, though not at once: a try is let through every now and then."""
    deadline = time.monotonic() + 30
    for name, method in (("a", "batch_set_v1"), ("b", "batch_get_v1")):
        while not all(result(sglang, name, method, chain, [0, 1, 2, 3], prefix=[])):
            assert time.monotonic() < deadline, f"{method} does not work again"
            time.sleep(0.02)


def test_a_server_starts_without_redis(sglang: Process) -> None:
    """With nobody listening a storage is made, says so once, and everything is a miss."""
    sglang.tell("open", name="a", extra={"url": "redis://127.0.0.1:1", "lookup_timeout_s": 0.5})
    for _ in range(3):
        assert result(sglang, "a", "batch_exists", keys(3)) == 0
        assert result(sglang, "a", "batch_set_v1", keys(3), [0, 1, 2], prefix=[]) == [False] * 3
    (line,) = sglang.tell("said")["said"]
    assert "KV is not shared for now" in line
    assert sglang.tell("stats", name="a")["counts"]["unavailable"] >= 3


def test_clear_empties_it_for_all(sglang: Process, real_server: Backend) -> None:
    """After a clear nothing is found, and it can be stored anew."""
    both(sglang, real_server)
    assert all(result(sglang, "a", "batch_set_v1", keys(3), [0, 1, 2], prefix=[]))
    assert sglang.tell("clear", name="a")["result"] is True
    assert result(sglang, "b", "batch_exists", keys(3)) == 0
    assert all(result(sglang, "b", "batch_set_v1", keys(3), [0, 1, 2], prefix=[]))

"""`distprefix audit` as an operator runs it after a host was taken over."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from tests.commands import run_cli
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.forks import run_function
from tests.payloads import KEYS, data
from tests.servers import Backend, Server

TEN = prompt(10)


def _audit(
    backend: Backend, *options: str, env: dict[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What the command prints, as JSON."""
    where = ("--url", backend.url or "", "--namespace", backend.namespace, "--json")
    if env is None:
        done = run_cli("audit", *where, *options)
    else:
        done = run_function("tests.commands:main", "audit", *where, *options, env=env)
    return done, json.loads(done.stdout)


def _fill(backend: Backend, **settings: Any) -> PrefixCacheOptimizer:
    """A worker that holds a prompt, with its payloads; what it reports of itself is withdrawn."""
    cache = backend.open("w1", **settings)
    cache.cache_prefix(TEN, range(10))
    assert cache.store(TEN, data(TEN)) == 10
    return cache


def _found(value: dict[str, Any]) -> list[str]:
    return [f"{finding['doubt']}: {finding['what']}" for finding in value["findings"]]


def test_sound_namespace_has_no_findings(real_server: Backend) -> None:
    """Exit code 0; all payloads are verified, cold ones too, and nothing of the tree is changed."""
    worker = _fill(real_server, cold_codec="raw")
    worker.cache_prefix([7] * 8, range(20, 22))
    worker.store([7] * 8, data([7] * 8))
    worker.demote(-60)
    before = real_server.dump()
    done, value = _audit(real_server)
    assert done.returncode == 0, done.stdout
    assert value == {
        **{"nodes": 2, "payloads": 12, "verified": 12, "unreadable": 0},
        **{"was_still": True, "findings": []},
    }
    assert real_server.dump() == before
    text = run_cli("audit", "--url", real_server.url or "", "--namespace", real_server.namespace)
    assert text.stdout == "2 nodes, 12 payloads read: 12 verified\nnothing is wrong\n"


def test_sample_bounds_what_is_read(real_server: Backend) -> None:
    """No more payloads are read than --sample says."""
    _fill(real_server)
    assert _audit(real_server, "--sample", "3")[1]["payloads"] == 3
    assert _audit(real_server, "--sample", "0")[1]["verified"] == 0


def test_changed_payloads_are_found(real_server: Backend) -> None:
    """Bytes that were changed, a payload put under another chunk's key, and one that was removed."""
    _fill(real_server)
    names = [real_server.keys.payload(head) for head in heads(TEN)]
    values: list[Any] = [real_server.admin.get(name) for name in names]
    real_server.admin.set(names[2], values[2][:-1] + bytes([values[2][-1] ^ 1]))
    real_server.admin.set(names[4], values[5])
    real_server.admin.delete(names[6])
    done, value = _audit(real_server)
    assert done.returncode == 1
    found = [line for line in _found(value) if line.startswith("payload: ")]
    assert len(found) == 3
    for at, reason in ((2, "damaged"), (4, "damaged"), (6, "missing")):
        assert any(heads(TEN)[at] in line and f"in warm is {reason}" in line for line in found)
    assert value["verified"] == 7
    assert any(line.startswith("structure: ") and heads(TEN)[6] in line for line in _found(value))


def test_payloads_of_who_has_no_key_are_found(real_server: Backend) -> None:
    """With keys a payload that they do not open is a finding; without keys encrypted ones are only counted."""
    _fill(real_server, encryption_keys=KEYS)
    done, value = _audit(real_server)
    assert (done.returncode, value["verified"], value["unreadable"]) == (0, 0, 10)
    env = {"DISTPREFIX_ENCRYPTION_KEYS": KEYS}
    done, value = _audit(real_server, env=env)
    assert (done.returncode, value["verified"], value["unreadable"]) == (0, 10, 0)
    intruder = real_server.open("w2")
    intruder.store([7] * 8, data([7] * 8))
    done, value = _audit(real_server, env=env)
    assert done.returncode == 1
    assert [line.partition(" is ")[2].partition(";")[0] for line in _found(value)] == ["unreadable"] * 2
    assert value["verified"] == 10


def test_claims_of_unknown_workers_are_found(real_server: Backend) -> None:
    """Coverage of a worker that never registered, and under an epoch that nobody was given."""
    worker = _fill(real_server)
    node = real_server.keys.node(heads(TEN)[0])
    epoch = worker.get_metrics()["epoch"]
    real_server.admin.hset(node, "h:ghost/0@gpu", "5:10")
    real_server.admin.hset(node, "h:w1/0@gpu", f"{epoch + 1}:10")
    done, value = _audit(real_server)
    assert done.returncode == 1
    claims = [line for line in _found(value) if line.startswith("claim: ")]
    assert claims == [
        "claim: ghost/0@gpu covers 10 chunks and is not registered",
        f"claim: w1/0@gpu covers 10 chunks and says epoch {epoch + 1}, and {epoch} is the newest that it was given",
    ]


def test_coverage_without_a_lease_is_found_where_all_hold_one(real_server: Backend) -> None:
    """With --leases a worker that holds none is a finding, and one that does is not."""
    _fill(real_server)
    leased = real_server.open("w2", worker_lease_s=600)
    leased.cache_prefix([7] * 8, range(2))
    assert _audit(real_server)[0].returncode == 0
    done, value = _audit(real_server, "--leases")
    assert done.returncode == 1
    assert _found(value) == ["claim: w1/0@gpu covers 10 chunks and holds no lease"]


def test_foreign_keys_are_found(real_server: Backend) -> None:
    """Keys of the namespace that we do not write, in the shard and beside it; those of others are not looked at."""
    _fill(real_server, worker_lease_s=600)
    base, beside = real_server.keys.base, real_server.keys.epochs.removesuffix("epochs")
    for key in (f"{base}junk", f"{base}meta:x", f"{beside}more", f"{beside}x:y", "dp:{another}:junk"):
        real_server.admin.set(key, "x" * 100)
    done, value = _audit(real_server)
    real_server.admin.delete("dp:{another}:junk")
    assert done.returncode == 1
    assert sorted(_found(value)) == sorted(
        f"key: {key} is none of ours" for key in (f"{base}junk", f"{base}meta:x", f"{beside}more", f"{beside}x:y")
    )


def test_broken_structure_is_found(real_server: Backend) -> None:
    """A tree that breaks its rules is reported as `check_integrity` says it."""
    _fill(real_server)
    real_server.admin.hincrby(real_server.keys.meta, "chunks", 5)
    done, value = _audit(real_server)
    assert done.returncode == 1
    assert _found(value) == ["structure: meta counts 15 chunks, there are 10"]


def test_cold_payloads_elsewhere_are_read(real_server: Backend, second: Server) -> None:
    """With --cold-url those on the other server are verified; without it the command says what to pass."""
    worker = _fill(real_server, cold_url=second.url, cold_codec="raw")
    worker.demote(-60)
    done, value = _audit(real_server, "--cold-url", second.url)
    assert (done.returncode, value["verified"]) == (0, 10), _found(value)
    refused = run_cli("audit", "--url", real_server.url or "", "--namespace", real_server.namespace)
    assert refused.returncode == 2
    assert "pass --cold-url" in refused.stderr
    with second.client() as client:
        client.delete(real_server.keys.payload(heads(TEN)[3], cold=True))
    done, value = _audit(real_server, "--cold-url", second.url)
    assert done.returncode == 1
    assert any(f"payload of chunk {heads(TEN)[3]} in cold is missing" in line for line in _found(value))


@pytest.mark.parametrize("option", ["--json", ""])
def test_no_namespace(real_server: Backend, option: str) -> None:
    """Exit code 1 and the name, as with other commands; no namespace is made."""
    options = [option] if option else []
    done = run_cli("audit", "--url", real_server.url or "", "--namespace", real_server.namespace, *options)
    assert done.returncode == 1
    assert f"there is no namespace '{real_server.namespace}'" in done.stderr
    assert not real_server.admin.exists(real_server.keys.descriptor)

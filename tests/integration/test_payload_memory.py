"""Much more than a process may have goes through it: its memory is bounded by what is under way."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from tests.integration.test_payload_stress import ROOT, everything_ends_well
from tests.payloads import KEYS, MIB
from tests.servers import Backend

LIMIT = 300 * MIB
BATCH = 64 * MIB
BUDGET = 3 * BATCH
PACKED: dict[str, Any] = {"payload_codec": "zstd", "encryption_keys": KEYS}
_CHILD = """
import json, sys
sys.path.insert(0, sys.argv[3])
from tests.integration.test_payload_memory import go_through
print(json.dumps(go_through(json.loads(sys.argv[1]), int(sys.argv[2]))))
"""


def payload(batch: int, chunk: int, size: int) -> bytes:
    """What nothing but its place decides; half of it can be packed."""
    noise = hashlib.shake_128(b"%d %d" % (batch, chunk)).digest(size // 2)
    return noise + bytes(size - len(noise))


def go_through(settings: dict[str, Any], batches: int) -> dict[str, Any]:
    """Store and load so many batches under a limit that the system enforces, each byte compared. Returns the counts."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    with pytest.raises(MemoryError):
        bytearray(LIMIT)
    right = 0
    with PrefixCacheOptimizer(PrefixCacheConfig(**settings, worker_id="small")) as cache:
        for batch in range(batches):
            size = 32 * MIB if batch % 4 == 3 else 2 * MIB
            chunks = BATCH // size
            tokens = [batch] * 4 * chunks
            assert cache.store(tokens, [payload(batch, chunk, size) for chunk in range(chunks)]) == chunks
            into = [bytearray(size) for _ in range(chunks)] if batch % 2 else None
            found = cache.load(tokens, into)
            assert found.chunks == chunks
            for chunk, got in enumerate(found.payloads):
                assert got == payload(batch, chunk, size)
                right += len(got)
            del into, found
        metrics = cache.get_metrics()
    # Not what getrusage tells: that begins with what the process had that started this one.
    most = next(
        1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in line
    )
    return {
        **{name: metrics[name] for name in ("payload_bytes_stored", "payload_bytes_loaded", "evicted_chunks")},
        "right": right,
        "most": most,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits all of a process's memory on Linux alone")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("batches", "settings"),
    [
        pytest.param(4, {}, id="raw"),
        pytest.param(4, PACKED, id="packed-and-encrypted"),
        pytest.param(64, {}, id="raw-long", marks=pytest.mark.long),
        pytest.param(16, PACKED, id="packed-and-encrypted-long", marks=pytest.mark.long),
    ],
)
def test_a_small_process_handles_much(real_server: Backend, batches: int, settings: dict[str, Any]) -> None:
    """Batches of 64 MiB go through a process that may have 300 MiB, and come back right: 4 GiB in the long form."""
    options: dict[str, Any] = {
        **{"url": real_server.url, "namespace": real_server.namespace, "strict": True, "chunk_size": 4},
        **{"lookup_timeout_s": 20, "publish_timeout_s": 20, "payload_timeout_s": 60},
        **{"l2_max_bytes": BUDGET, "high_watermark": 1.0, "low_watermark": 0.5, **settings},
    }
    command = [sys.executable, "-c", _CHILD, json.dumps(options), str(batches), ROOT]
    # Without this the allocator keeps freed buffers of up to 32 MiB, in pieces, and how much that is depends on chance.
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    child = subprocess.run(command, cwd=ROOT, env=given, stdout=subprocess.PIPE, check=True, timeout=500)
    done = json.loads(child.stdout)
    assert done["right"] == done["payload_bytes_stored"] == done["payload_bytes_loaded"] == batches * BATCH
    assert done["most"] < LIMIT
    if not settings:
        assert done["evicted_chunks"] > 0
    with PrefixCacheOptimizer(PrefixCacheConfig(**options, worker_id="reader")) as reader:
        assert 0 < reader.check_integrity().bytes <= BUDGET
        everything_ends_well(real_server, reader)
        reader.clear()

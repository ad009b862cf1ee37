"""Every command of docs/redis-cli.md runs against a server that has a small tree, as the read-only user."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.redis.embedded import find_binary
from tests.servers import deployed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "redis-cli.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
ADDRESS = "-h localhost -p 6379"
MARK = "=== end of block, exit code "
ERROR = re.compile(r"^\(?(error\)?|ERR|NOAUTH|NOPERM|NOSCRIPT|WRONGPASS|WRONGTYPE|Could not connect|DP[A-Z]{3,} )")
# What a block prints, by a part of it that no other block has.
EXPECTED = {
    "--scan --pattern 'dp:ns:*'": r"^dp:ns:docs$",
    '"dp:ns:$NS"': r"^chunk_size\n4$",
    "}:epochs": r"^worker-0/0\n\d{13}\nworker-1/0\n\d{13}$",
    '"$BASE:meta"\n': r"^nodes\n3\nchunks\n16\nbytes\n\d+\nwarm\n0\nlog\n\d+\npolicy\nlru\nelsewhere\n0$",
    "ZCARD": r"\A2\n\Z",
    "| wc -l": r"^\s*3$",
    'HKEYS "$BASE:j:root"\n': r"^[0-9a-f]{32}$",
    'HKEYS "$BASE:n:$HEAD"\n': r"\A(?=(.*\n)*r\n)(?=(.*\n)*h:worker-0/0@gpu\n)(?=(.*\n)*b:worker-1/0@gpu\n)",
    " p d a n c\n": r"^\n0\n\d{13}\n\d+\n\d{13}$",
    "r | od -An -v -tx1 | tr -d ' '\n": r"\A([0-9a-f]{32}\n){8}\Z",
    "MATCH 'h:*'": r"\A0\n(h:worker-[01]/0@gpu\n\d{13}:8\n){2}\Z",
    "od -An -v -tu4": r"\A\s+(0\s+1\s+2\s+3\n\s+4\s+5\s+6\s+7|20\s+21\s+22\s+23\n\s+24\s+25\s+26\s+27)\n\Z",
    "-x EVALSHA_RO": r"^8\n8\n\d{13}\n\d+\n\d{13}\n\n\n2\n(worker-[01]/0@gpu\n\d{13}:8\n){2}",
    "LAST=": r"\A(?=(.*\n)*o\n)([0-9a-f]{32}\n|o\n|worker-[01]/0@gpu\n){5}\Z",
    '"$BASE:holders"': r"\A(worker-[01]/0@gpu\n1\n){2}\Z",
    "ZRANGE": r"\A([0-9a-f]{32}\n\d{13}\n){2}\Z",
    "XREVRANGE": r"^\d+-\d+\nn\n2\ntrimmed\n[0-9a-f]{32}\nsize\n4$",
    "ZREVRANGE": r"\A[0-9a-f]{32}\n1\n\Z",
    "MATCH 'l:*'": r"\A0\nl:worker-1:[0-9a-f]{8}:\d+\n\d{13}:8\n\Z",
    '--scan --pattern "$BASE:claim:*"\n': r"\Adp:{docs:0}:claim:[0-9a-f]{32}\n\Z",
    'GET "$CLAIM"': r"\A\d{13} worker-1\n\d+\n\Z",
    "OBJECT ENCODING": r"^\d+\nhashtable$",
    "awk": r"^\d{3,}$",
}

pytestmark = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not (shutil.which("redis-cli") and shutil.which("bash")),
    reason="redis-cli or bash is not on PATH; Debian has the first in redis-tools",
)


class Result(NamedTuple):
    """What one block did."""

    code: int
    output: str


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Run a server with the settings of deploy/ and users for this namespace."""
    binary = shutil.which("redis-server") or find_binary()
    with deployed(tmp_path_factory.mktemp("server"), binary, namespaces=["docs*"]) as number:
        yield number


def _publish_tree(port: int) -> None:
    """Two workers, one root with two branches, one of them trimmed; the root is hot and leased, a chunk is claimed."""

    def config(worker: str) -> PrefixCacheConfig:
        return PrefixCacheConfig(
            url=f"redis://distprefix:distprefix@127.0.0.1:{port}",
            namespace="docs",
            worker_id=worker,
            chunk_size=4,
            touch_interval_s=0,
            prewarm_threshold=1,
            lookup_timeout_s=5,
            publish_timeout_s=5,
            strict=True,
        )

    trunk = list(range(32))
    with PrefixCacheOptimizer(config("worker-0")) as first, PrefixCacheOptimizer(config("worker-1")) as second:
        first.cache_prefix(trunk + list(range(100, 116)), block_ids=range(12))
        second.cache_prefix(trunk + list(range(200, 220)), block_ids=range(20, 33))
        second.remove_skipped_blocks([32])
        hit = second.find_longest_cache_hit(trunk, blocks_of="worker-0/0@gpu")
        assert hit.block_ids == tuple(range(8))
        assert hit.lease(3600).active
        second.flush()  # before the next look-up is a hit too
        assert second.find_longest_cache_hit(trunk + [300] * 4).claim(3600).mine
        second._state.outbox.touches.take()


@pytest.fixture(scope="module")
def results(port: int) -> list[Result]:
    """All blocks of the page, run in order in one shell, because later ones use what earlier ones set."""
    _publish_tree(port)
    script = ["set -u -o pipefail"]
    for i, block in enumerate(BLOCKS):
        text = block
        if i == 0:
            text = text.replace(ADDRESS, f"-h 127.0.0.1 -p {port}").replace("NS=default", "NS=docs")
        script += [text, f'echo "{MARK}$?"']
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PATH": path, "LC_ALL": "C", "DP_INSPECTOR_PASSWORD": "inspector"},
    )
    output = done.stdout.decode("latin-1")
    assert not done.stderr, done.stderr.decode()
    parts = re.split(rf"{MARK}(\d+)\n", output)
    return [Result(int(code), text) for text, code in zip(parts[::2], parts[1::2], strict=False)]


def test_page_sets_where_to_look_first() -> None:
    """The first block has the very texts that the fixture replaces."""
    assert ADDRESS in BLOCKS[0]
    assert "NS=default" in BLOCKS[0]


@pytest.mark.parametrize("i", range(len(BLOCKS)), ids=lambda i: BLOCKS[i].splitlines()[-1][-40:].strip())
def test_block_runs_and_prints_what_the_page_says(results: list[Result], i: int) -> None:
    """The block ends well, prints no error, and prints what its sentence promises."""
    result = results[i]
    assert result.code == 0, result.output
    for line in result.output.splitlines():
        assert not ERROR.match(line), line
    expected = [pattern for part, pattern in EXPECTED.items() if part in BLOCKS[i]]
    if not expected:  # a block that sets something says nothing
        assert result.output == "", "add this block to EXPECTED"
    for pattern in expected:
        assert re.search(pattern, result.output, re.MULTILINE), result.output


def test_every_expectation_belongs_to_a_block() -> None:
    """No expectation is left over from a block that the page no longer has."""
    unused = [part for part in EXPECTED if not any(part in block for block in BLOCKS)]
    assert unused == []

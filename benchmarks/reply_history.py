"""What it costs that each reply says of which history it is: python benchmarks/reply_history.py.

The scripts as they are, against the same ones without the generation and the caller's writes, in one run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import redis
from measure import Case, Figure, interleave, run_parts, untargeted

from distprefix import Chain, PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.operations import SCHEMA
from distprefix.redis.scripts import load_script

_CHUNKS = (1, 64, 512)


def main() -> None:
    """Run what was asked for and print it."""
    run_parts({"walk": walk, "insert": insert}, __doc__)


def walk(url: str, scale: float) -> list[Figure]:
    """Look-ups that L1 knows nothing of."""
    return _compare(url, scale, "walk")


def insert(url: str, scale: float) -> list[Figure]:
    """Publishes of what is there already."""
    return _compare(url, scale, "insert")


def _compare(url: str, scale: float, name: str) -> list[Figure]:
    figures: list[Figure] = []
    with PrefixCacheOptimizer(PrefixCacheConfig(url=url, namespace=name, worker_id="w", feed_interval_s=0)) as cache:
        link = cache._state.link
        admin: Any = link.admin.redis
        command = "EVALSHA_RO" if name == "walk" else "EVALSHA"
        ours = (command, admin.script_load(load_script(name).body), 1, link.keys.meta, link.history.header)
        other = (command, admin.script_load(_without(load_script(name).body)), 1, link.keys.meta, SCHEMA)
        for chunks in _CHUNKS:
            chain = b"".join(b"%016d" % number for number in range(chunks))
            cache.cache_prefix(Chain.packed(chain), range(chunks))
            args: tuple[Any, ...] = ("", chain)
            if name == "insert":
                args = (256, "w/0@gpu", link.epoch, 0, chain, b"", b"")
            calls = {
                "ours": partial(admin.execute_command, *ours, *args),
                "other": partial(admin.execute_command, *other, *args),
            }
            figures += _figures(f"{name}, {chunks} chunks", admin, calls, int(200 * scale))
    return figures


def _figures(what: str, admin: redis.Redis, calls: dict[str, Any], rounds: int) -> list[Figure]:
    size = {which: _bytes_of(admin, call) for which, call in calls.items()}
    took = interleave({which: Case(call, number=20) for which, call in calls.items()}, rounds)
    more = size["ours"] - size["other"]
    ratio = took["ours"] / took["other"]
    return [
        untargeted(f"{what}: bytes both ways", f"{size['ours']}", f"{size['other']}", more, " B"),
        Figure(f"{what}: time", f"{took['ours']:.1f} us", f"{took['other']:.1f} us", ratio, "<=", 1.03, "x"),
    ]


def _without(body: str) -> str:
    """The script as it was before replies said of which history they are."""
    head, _, rest = body.partition("local function answer(reply)\n")
    _, _, rest = rest.partition("\nend\n")
    start = head.index("local written = tonumber")
    uncounted = "local written, is_noted = -1, false\nlocal function answer(reply)\n  return reply\nend\n"
    return head[:start] + uncounted + rest


def _bytes_of(admin: redis.Redis, call: Any) -> int:
    """Bytes that the server receives and sends for a call."""
    rounds = 50

    def total() -> int:
        found: Any = admin.info("stats")
        return found["total_net_input_bytes"] + found["total_net_output_bytes"]

    total()
    between = total()
    idle = total() - between
    before = total()
    for _ in range(rounds):
        call()
    return round((total() - before - idle) / rounds)


if __name__ == "__main__":
    main()

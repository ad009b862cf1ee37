"""`distprefix demo`: several nodes share what they computed, shown live."""

from __future__ import annotations

import re
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table

from distprefix.cli.common import ColdUrl, Json, Url, cold_tier, errors, opened
from distprefix.cli.output import console, show
from distprefix.redis.cleanup import remove_namespaces
from distprefix.replay.fleet import Fleet, Outcome
from distprefix.replay.sessions import Turn, coding_sessions

__all__ = ["demo"]

_CHUNK_SIZE = 16
_SHARING, _ALONE, _SMALL = "sharing", "each node alone", "sharing, little room"
_MODES = (_SHARING, _ALONE)
_AFTER_RESTART = 20
_PAYLOAD_BYTES = 1024
"""KV bytes of a chunk, in the mode that shares: a real model has a hundred to a thousand times as many."""
_ROWS = (
    ("requests", "requests"),
    ("tokens asked", "asked"),
    ("tokens to compute", "computed"),
    ("tokens from own cache", "own"),
    ("tokens from other nodes", "others"),
)
_TIERS = (
    *("payload_bytes_stored", "payload_bytes_loaded", "payload_bytes_loaded_cold"),
    *("demoted_bytes", "demoted_bytes_packed", "promoted_bytes"),
)
_MIB = 1024 * 1024


@dataclass(slots=True)
class Tally:
    """What one node, or all of them, did; in tokens."""

    requests: int = 0
    asked: int = 0
    computed: int = 0
    own: int = 0
    others: int = 0
    calls: int = 0
    evicted: int = 0
    """By the tree, when its budget was full."""
    warm: int = 0
    """Share of what node 0 hit that its own process answered, in its first requests after the restart, in percent."""
    loaded: int = 0
    """Chunks whose KV bytes were loaded, and were right."""
    wrong: int = 0

    def add(self, outcome: Outcome, tokens: int) -> None:
        """Count a request."""
        self.requests += 1
        self.asked += tokens
        self.computed += tokens - outcome.matched * _CHUNK_SIZE
        self.own += outcome.own * _CHUNK_SIZE
        self.others += (outcome.matched - outcome.own) * _CHUNK_SIZE
        self.calls += outcome.calls
        self.evicted += outcome.evicted * _CHUNK_SIZE
        self.loaded += outcome.moved.loaded - outcome.moved.wrong
        self.wrong += outcome.moved.wrong


def demo(
    url: Url = None,
    namespace: Annotated[str, typer.Option(help="Namespaces made for the demo begin with this.")] = "demo",
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Node processes.")] = 4,
    sessions: Annotated[int, typer.Option(min=1, max=1000, help="Coding-agent sessions.")] = 24,
    turns: Annotated[int, typer.Option(min=1, max=40, help="Requests of each session.")] = 8,
    join: Annotated[
        bool, typer.Option("--join", help="Share --namespace, as it is named, with other demos, and leave it there.")
    ] = False,
    cold_url: ColdUrl = None,
    as_json: Json = False,
) -> None:
    """Run coding-agent sessions on several nodes that share prefixes, and compare with each node alone.

    Needs nothing: the prompts are made of Python's own sources, a token a byte. The sessions' turns go to the nodes in
    rotation, as behind a load balancer that does not know about caches. Nodes that share also load and store made-up KV
    bytes; half-way all of them become cold.
    """
    with errors(), opened(url) as (client, address):
        work = list(coding_sessions(sessions, turns))
        name = namespace if join else f"{namespace}-{time.time_ns():x}"
        modes = {"sharing": name} if join else {title: f"{name}-{i}" for i, title in enumerate((*_MODES, _SMALL))}
        totals: dict[str, Tally] = {}
        moved: list[dict[str, Any]] = []
        try:
            for title, space in modes.items():
                settings: dict[str, Any] = {
                    **{"url": address, "namespace": space, "chunk_size": _CHUNK_SIZE},
                    **{"lookup_timeout_s": 5.0, "publish_timeout_s": 5.0},
                }
                if title == _SMALL:  # a third of what the sessions need
                    room = max(1, len(work[-1].tokens) // 4 // _CHUNK_SIZE * sessions // 3)
                    settings |= {"l2_max_chunks": room, "high_watermark": 1.0, "low_watermark": 0.9, "in_step": True}
                if title == _SHARING:
                    settings |= {"payload_bytes": _PAYLOAD_BYTES, "payload_timeout_s": 30.0, **cold_tier(cold_url)}
                host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:40]
                with Fleet(nodes, settings, share=title != _ALONE, name=host if join else "node") as fleet:
                    live = console.is_terminal and not as_json
                    totals[title] = _run(fleet, work, nodes, title, live=live)
                    if title == _SHARING:
                        moved = fleet.metrics()
        finally:
            for space in () if join else modes.values():
                remove_namespaces(client, space, nodes, cold_url)
        tiers = {name: sum(each[name] for each in moved) for name in _TIERS}
        value = {**{title: _as_dict(tally) for title, tally in totals.items()}, "tiers": tiers}
        show(
            value, as_json=as_json, render=lambda _: Group(_summary(totals, nodes, sessions), _tier_line(tiers, totals))
        )


def _run(fleet: Fleet, work: list[Turn], nodes: int, title: str, *, live: bool) -> Tally:
    tallies, total = [Tally() for _ in range(nodes)], Tally()
    after: list[Outcome] = []

    def collect() -> None:
        for outcome in fleet.outcomes():
            tokens = sizes[outcome.node].popleft()
            tallies[outcome.node].add(outcome, tokens)
            total.add(outcome, tokens)
            if restarted and outcome.node == 0:
                after.append(outcome)
        screen.update(_board(title, tallies, len(work)))

    sizes: list[deque[int]] = [deque() for _ in range(nodes)]
    restarted = False
    with Live(console=console, refresh_per_second=12, transient=True, auto_refresh=live) as screen:
        if not live:
            screen.stop()
        for i, turn in enumerate(work):
            if i == len(work) // 2 and title != _ALONE:
                while fleet.in_flight:
                    collect()
                restarted = _half_way(fleet, title)
            while fleet.in_flight >= nodes:
                collect()
            node = (turn.session + turn.number) % nodes  # every turn of a session meets another node
            sizes[node].append(len(turn.tokens) // 4)
            fleet.send(node, turn.tokens)
        while fleet.in_flight:
            collect()
    first = after[:_AFTER_RESTART]
    total.warm = round(100 * sum(outcome.l1 for outcome in first) / max(1, sum(outcome.matched for outcome in first)))
    return total


def _half_way(fleet: Fleet, title: str) -> bool:
    """What happens when half of the requests are done. Whether node 0 was restarted."""
    if title == _SHARING:
        fleet.demote()
        return False
    fleet.restart(0, prewarm=True)
    return True


def _board(title: str, tallies: list[Tally], total: int) -> Group:
    table = Table(
        title=f"{title}: {sum(tally.requests for tally in tallies):,} of {total:,} requests", title_justify="left"
    )
    table.add_column("node")
    for column in ("requests", "tokens asked", "computed", "own cache", "from other nodes", "saved"):
        table.add_column(column, justify="right")
    for i, tally in enumerate(tallies):
        table.add_row(f"node-{i}", *_row(tally))
    return Group(table)


def _row(tally: Tally) -> list[str]:
    saved = 100 * (tally.own + tally.others) / tally.asked if tally.asked else 0.0
    numbers = (tally.requests, tally.asked, tally.computed, tally.own, tally.others)
    return [*(f"{number:,}" for number in numbers), f"{saved:.1f} %"]


def _summary(totals: dict[str, Tally], nodes: int, sessions: int) -> Group:
    table = Table(title=f"{sessions} coding-agent sessions on {nodes} nodes", title_justify="left")
    table.add_column(style="bold")
    columns = [totals[title] for title in sorted(totals)]
    for title in sorted(totals):
        table.add_column(title, justify="right")
    for label, name in _ROWS:
        table.add_row(label, *(f"{getattr(tally, name):,}" for tally in columns))
    table.add_row("saved", *(_row(tally)[-1] for tally in columns))
    table.add_row("Redis calls per look-up", *(f"{tally.calls / max(1, tally.requests):.2f}" for tally in columns))
    if len(columns) == 1:
        return Group(table)
    less, small = totals[_ALONE].computed / max(1, totals[_SHARING].computed), totals[_SMALL]
    return Group(
        table,
        f"Sharing leaves {less:.1f} times fewer tokens to prefill.",
        f"With room for a third, {small.evicted:,} tokens were evicted, least recently used first. Node 0 restarted "
        f"half-way and pre-warmed: its own process answered {small.warm} % of what it hit first.",
    )


def _tier_line(tiers: dict[str, int], totals: dict[str, Tally]) -> str:
    """What became of the KV bytes."""
    wrong = sum(tally.wrong for tally in totals.values())
    loaded, cold = tiers["payload_bytes_loaded"], tiers["payload_bytes_loaded_cold"]
    smaller = tiers["demoted_bytes"] / max(1, tiers["demoted_bytes_packed"])
    return (
        f"Nodes that share stored {tiers['payload_bytes_stored'] / _MIB:,.0f} MiB of KV bytes, and loaded what others "
        f"had computed, {loaded / _MIB:,.1f} MiB, {wrong or 'none'} of it wrong: "
        f"{(loaded - cold) / _MIB:,.1f} MiB from the warm tier, {cold / _MIB:,.1f} MiB from the cold one. Half-way "
        f"{tiers['demoted_bytes'] / _MIB:,.0f} MiB became cold, {smaller:.1f} times smaller; "
        f"{tiers['promoted_bytes'] / _MIB:,.1f} MiB became warm again."
    )


def _as_dict(tally: Tally) -> dict[str, int]:
    names = ("requests", "asked", "computed", "own", "others", "calls", "evicted", "warm", "loaded", "wrong")
    return {name: getattr(tally, name) for name in names}

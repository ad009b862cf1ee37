"""Timing for the benchmarks: cases take turns within one run, so that what disturbs one disturbs all."""

from __future__ import annotations

import argparse
import json
import operator
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import redis

from distprefix.redis.embedded import EmbeddedServer

__all__ = ["Case", "Figure", "as_json", "interleave", "print_table", "run_parts", "untargeted"]

_RELATIONS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Case:
    """Something to time. `before` prepares every run and is not timed; a turn is `number` runs."""

    run: Callable[[], Any]
    before: Callable[[], Any] = _nothing
    number: int = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: a measured value and what it has to be; without a relation it has no target."""

    what: str
    ours: str
    other: str
    value: float
    relation: str
    target: float
    unit: str

    @property
    def met(self) -> bool | None:
        """Whether the value is as good as it has to be; None without a target."""
        return _RELATIONS[self.relation](self.value, self.target) if self.relation else None


def untargeted(what: str, ours: str, other: str, value: float, unit: str) -> Figure:
    """A figure that nobody set a target for."""
    return Figure(what, ours, other, value, "", 0, unit)


def interleave(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Microseconds that one run of each case takes, the median of all; the first tenth of the rounds warms up.

    In every round each case has its turn, in random order, of `number` runs: single runs that take microseconds would
    otherwise be measured with the caches, and the sleeping server, that runs of milliseconds leave behind.
    """
    taken: dict[str, list[int]] = {name: [] for name in cases}
    warm_up = max(1, rounds // 10)
    for i in range(warm_up + rounds):
        for name, case in random.sample(list(cases.items()), len(cases)):
            for _ in range(case.number):
                case.before()
                began = time.perf_counter_ns()
                case.run()
                took = time.perf_counter_ns() - began
                if i >= warm_up:
                    taken[name].append(took)
    return {name: statistics.median(times) / 1000 for name, times in taken.items()}


def print_table(figures: list[Figure]) -> None:
    """The figures as a Markdown table, which reads well as plain text too."""
    head = ("what", "ours", "compared with", "measured", "target", "met")
    rows = [head, tuple("---" for _ in head)]
    rows += [
        (
            figure.what,
            figure.ours,
            figure.other,
            _number(figure.value) + figure.unit,
            f"{figure.relation} {_number(figure.target)}{figure.unit}" if figure.relation else "-",
            {True: "yes", False: "NO", None: "-"}[figure.met],
        )
        for figure in figures
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def as_json(figures: list[Figure], about: dict[str, Any]) -> dict[str, Any]:
    """The figures as one object."""
    return {**about, "figures": [{**asdict(figure), "met": figure.met} for figure in figures]}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def run_parts(parts: Mapping[str, Callable[[str, float], list[Figure]]], doc: str | None) -> None:
    """Run the parts that the command line asks for on a server of their own, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds: to see that it runs")
    parser.add_argument("--only", choices=sorted(parts), action="append", help="parts to run; default: all")
    options = parser.parse_args()
    scale = 0.1 if options.quick else 1.0
    figures: list[Figure] = []
    with EmbeddedServer() as server:
        about = _about(server.url)
        if not options.json:
            print(", ".join(f"{name} {value}" for name, value in about.items()), file=sys.stderr)
        for name in options.only or parts:
            figures += parts[name](server.url, scale)
    if options.json:
        print(json.dumps(as_json(figures, about), indent=2))
    else:
        print_table(figures)


def _about(url: str) -> dict[str, str]:
    with redis.Redis.from_url(url) as plain:
        info: Any = plain.info("server")
    models = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        "server": f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])}",
        "Python": platform.python_version(),
        "redis-py": redis.__version__,
        "CPU": f"{len(models)} x {models[0].partition(':')[2].strip()}" if models else platform.processor(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""

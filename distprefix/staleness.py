"""How often L1 says more than there is: a sample of its answers is checked against Redis afterwards."""

from __future__ import annotations

from distprefix import operations
from distprefix.errors import DistPrefixError
from distprefix.l1 import Live
from distprefix.nodes import NodeView
from distprefix.state import State

__all__ = ["check_samples"]


def check_samples(state: State) -> None:
    """Walk the sampled prompts again and count what L1 got wrong. One Redis call each. Never raises."""
    while True:
        try:
            chain, told = state.samples.popleft()
        except IndexError:
            return
        try:
            views = state.link.publish(operations.walk(chain, 0))
        except DistPrefixError:
            return
        held = _coverage(views, state.link.is_live)
        with state.lock:
            state.counts["staleness_checked"] += 1
            state.counts["staleness_over"] += any(chunks > held.get(holder, 0) for holder, chunks in told.items())
            state.counts["staleness_under"] += any(chunks > told.get(holder, 0) for holder, chunks in held.items())


def _coverage(views: list[NodeView], live: Live) -> dict[str, int]:
    reached: dict[str, int] = {}
    for view in views:
        for holder, (epoch, end) in view.holders.items():
            if reached.get(holder, 0) == view.start and live(holder, epoch):
                reached[holder] = min(end, view.start + view.matched)
    return reached

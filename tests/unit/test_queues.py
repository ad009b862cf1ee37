"""Bounded collections drop their oldest entry in one step, whatever was dropped before."""

from __future__ import annotations

import ast
from array import array
from collections import Counter, OrderedDict
from pathlib import Path

import pytest

from distprefix.events.frames import Stored
from distprefix.events.parking import Parking
from distprefix.own import OwnBlocks

ROOT = Path(__file__).parents[2]
_READ_ONLY = {"distprefix/engines/paged.py", "distprefix/tiers/encryption.py"}
"""Files that read the first entry of a dict from which they never remove one."""
_BOUND = 100


def _name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _waiting(number: int) -> Stored:
    return Stored((number,), number + (1 << 40), b"", 4, "gpu", 0, "full_attention", (), ())


def _takes_the_first(call: ast.Call) -> bool:
    """Whether a call is `next(iter(...))` or `.pop(0)`: both pass over, or move, what stays."""
    match call:
        case ast.Call(func=ast.Name(id="next"), args=[ast.Call(func=ast.Name(id="iter")), *_]):
            return True
        case ast.Call(func=ast.Attribute(attr="pop"), args=[ast.Constant(value=0)]):
            return True
        case _:
            return False


@pytest.mark.parametrize("path", sorted((ROOT / "distprefix").rglob("*.py")), ids=lambda path: path.name)
def test_no_dict_or_list_is_used_as_a_queue(path: Path) -> None:
    """The first key of a dict follows all deleted ones, and the first item of a list moves all others."""
    name = str(path.relative_to(ROOT))
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if _takes_the_first(call)]
    assert not lines or name in _READ_ONLY, f"{name}, lines {lines}: use popitem(last=False) or a deque"


def test_own_blocks_drop_the_chain_published_longest_ago() -> None:
    """Through 5,000 chains, some of them published again, the order is that of a model."""
    blocks = OwnBlocks(8, _BOUND)
    model: OrderedDict[bytes, None] = OrderedDict()
    for step in range(5_000):
        number = step - 3 * (step % 7 == 0) if step > _BOUND else step
        name = _name(number)
        blocks.remember(name, array("I", [number]).tobytes(), told=True)
        model.pop(name, None)
        model[name] = None
        expected = [model.popitem(last=False)[0] for _ in range(len(model) - _BOUND)]
        assert blocks.give_up() == expected
    assert len(blocks) == _BOUND


def test_parking_drops_what_waits_longest() -> None:
    """Through 5,000 blocks, some of them taken, those that stay are the newest, and each dropped one is counted."""
    counts = Counter[str]()
    parking = Parking(_BOUND, counts)
    model: OrderedDict[int, None] = OrderedDict()
    taken = 0
    for number in range(5_000):
        parking.park(_waiting(number))
        model[number] = None
        if len(model) > _BOUND:
            model.popitem(last=False)
        if number % 5 == 0 and number - 3 in model:
            del model[number - 3]
            assert parking.take([number - 3 + (1 << 40)]) == [_waiting(number - 3)]
            taken += 1
    assert parking.blocks == len(model)
    assert counts["parked_dropped"] == 5_000 - len(model) - taken
    waiting = [event for number in model for event in parking.take([number + (1 << 40)])]
    assert waiting == [_waiting(number) for number in model]

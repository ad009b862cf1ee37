"""Exceptions: what is exported, and that they pass from one process to another."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest

import distprefix
from distprefix import DistPrefixError, errors
from distprefix.redis.data import WriteError

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def _below(base: type[DistPrefixError]) -> Iterator[type[DistPrefixError]]:
    yield base
    for each in base.__subclasses__():
        yield from _below(each)


EVERY = sorted(
    (each for each in _below(DistPrefixError) if each.__module__.startswith("distprefix.")),
    key=lambda each: each.__name__,
)


def _made(kind: type[DistPrefixError]) -> DistPrefixError:
    return WriteError("a message", [True, False]) if kind is WriteError else kind("a message")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", EVERY)
def test_errors_are_pickled(kind: type[DistPrefixError], protocol: int) -> None:
    """An exception keeps its type, its message, its attributes and its notes in every protocol."""
    error = _made(kind)
    error.server = "warm"  # pyright: ignore[reportAttributeAccessIssue]
    error.add_note("while storing")
    for copied in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(copied) is kind
        assert (str(copied), copied.args) == ("a message", ("a message",))
        assert vars(copied) == vars(error)
    if kind is not WriteError:
        assert str(pickle.loads(pickle.dumps(kind(), protocol))) == kind.__doc__


def test_every_error_is_listed() -> None:
    """errors.__all__ has every exception of the package, but for the one that belongs to the data path."""
    public = [each.__name__ for each in EVERY if each is not WriteError and not each.__name__.startswith("_")]
    assert public == errors.__all__


def test_errors_that_programs_catch_are_exported() -> None:
    """What opening and using a cache raises can be imported from the package itself."""
    exported = {name for name in distprefix.__all__ if name.endswith("Error")}
    assert {"ConfigError", "DistPrefixError", "InvalidInputError", "NamespaceError", "UnavailableError"} <= exported
    for name in exported:
        assert getattr(distprefix, name) is getattr(errors, name)

"""What we know of an engine's interface, and what of it is not so. Knows classes as interfaces.py describes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CONSTRUCTOR", "Contract", "Interface", "accepts", "broken"]

CONSTRUCTOR = "()"
Methods = Mapping[str, str]
Described = Mapping[str, Mapping[str, Any]]
_KINDS = inspect.Parameter
_STARS = (_KINDS.VAR_POSITIONAL, _KINDS.VAR_KEYWORD)


@dataclass(frozen=True)
class Interface:
    """A class of an engine, and ours that is one. Parameters by method, as `signature` reads them."""

    theirs: str
    ours: str
    abstract: Methods
    """All that are abstract."""
    hooks: Methods = field(default_factory=dict[str, str])
    """All others that we override; the constructor too where the engine calls it."""
    alone: frozenset[str] = frozenset()
    """What the engine asks for though its class has no such."""


@dataclass(frozen=True)
class Contract:
    """All that we take from an engine."""

    interfaces: tuple[Interface, ...]
    exact: Mapping[str, Methods]
    """Functions, by class, whose parameters are just these."""
    calls: Mapping[str, Methods]
    """How we call their methods: positional arguments by any name, keywords with a ``=``."""
    reads: Mapping[str, str]
    """What we read of their objects, by class."""

    def targets(self) -> list[str]:
        """Everything to describe."""
        classes = {name for each in self.interfaces for name in (each.theirs, each.ours)}
        return sorted(classes.union(self.exact, self.calls, self.reads))


def signature(words: str) -> inspect.Signature:
    """The signature that words tell: names in their order, with ``=`` where there is a default, and stars."""
    parameters: list[inspect.Parameter] = []
    kind = _KINDS.POSITIONAL_OR_KEYWORD
    for word in words.split():
        name = word.strip("*=")
        if word.startswith("**"):
            parameters.append(_KINDS(name, _KINDS.VAR_KEYWORD))
        elif word.startswith("*"):
            kind = _KINDS.KEYWORD_ONLY
            parameters += [_KINDS(name, _KINDS.VAR_POSITIONAL)] if name else []
        else:
            parameters.append(_KINDS(name, kind, default=None if word.endswith("=") else _KINDS.empty))
    return inspect.Signature(parameters)


def accepts(ours: str, theirs: str) -> bool:
    """Whether ours can be called in every way in which theirs can."""
    if "property" in {ours, theirs}:
        return ours == theirs
    own, wanted = signature(ours).parameters, signature(theirs).parameters
    places = [name for name, each in own.items() if each.kind is _KINDS.POSITIONAL_OR_KEYWORD]
    kinds = {each.kind for each in own.values()}

    def takes(place: int, each: inspect.Parameter) -> bool:
        if each.kind in _STARS:
            return each.kind in kinds
        same = own.get(each.name)
        if same is None:
            return kinds.issuperset(_STARS)
        in_place = each.kind is _KINDS.KEYWORD_ONLY or places[place : place + 1] == [each.name]
        return in_place and (each.default is _KINDS.empty or same.default is not _KINDS.empty)

    needed = [name for name, each in own.items() if each.default is _KINDS.empty and each.kind not in _STARS]
    return all(takes(place, each) for place, each in enumerate(wanted.values())) and wanted.keys() >= set(needed)


def broken(contract: Contract, described: Described) -> list[str]:
    """What is not as the contract says, a line each."""
    lines = [line for each in contract.interfaces for line in _broken_interface(each, described)]
    for ours in {each.ours: None for each in contract.interfaces}:
        lines += _overriding_nothing(ours, [each for each in contract.interfaces if each.ours == ours], described)
    for target, methods in contract.exact.items():
        lines += _unlike(target, methods, described[target]["methods"])
    for target, calls in contract.calls.items():
        for name, call in calls.items():
            theirs = described[target]["methods"].get(name)
            if theirs is None or not _takes(theirs, call):
                lines.append(f"{target} {name} is {theirs!r}: we call it with {call!r}")
    for target, names in contract.reads.items():
        missing = set(names.split()).difference(described[target]["names"])
        lines += [f"{target} has no {name}, which we read" for name in sorted(missing)]
    return lines


def _broken_interface(known: Interface, described: Described) -> Iterator[str]:
    theirs, ours = described[known.theirs], described[known.ours]
    abstract = set(theirs["abstract"])
    for name in sorted(abstract.difference(known.abstract)):
        yield f"{known.theirs} {name} is abstract, and new to us"
    for name in sorted(set(known.abstract).difference(abstract)):
        yield f"{known.theirs} {name} is abstract no more"
    for name in ours["abstract"]:
        yield f"{known.ours} has no {name}"
    methods = {**known.abstract, **known.hooks}
    yield from _unlike(known.theirs, methods, theirs["methods"])
    for name in methods:
        own, wanted = ours["methods"].get(name), theirs["methods"].get(name)
        if own is not None and wanted is not None and not accepts(own, wanted):
            yield f"{known.ours} {name} takes {own!r}, not {wanted!r}"


def _overriding_nothing(ours: str, known: list[Interface], described: Described) -> Iterator[str]:
    """What a class of ours has that no base of it has, or that its contract does not name."""
    own, methods = described[ours]["own"], described[ours]["methods"]
    theirs = {name for each in known for name in described[each.theirs]["names"]}
    named = {name for each in known for name in (*each.abstract, *each.hooks)}
    for name in own:
        if name not in theirs and not any(name in each.alone for each in known):
            yield f"{ours} {name} overrides nothing"
        elif name in theirs and name in methods and name not in named:
            yield f"{ours} {name} overrides what the contract does not name"


def _unlike(target: str, known: Methods, theirs: Methods) -> Iterator[str]:
    for name, words in known.items():
        if theirs.get(name) != words:
            yield f"{target} {name} is {theirs.get(name)!r}, not {words!r}"


def _takes(theirs: str, call: str) -> bool:
    words = call.split()
    try:
        signature(theirs).bind(*filter(lambda word: "=" not in word, words), **{w[:-1]: w for w in words if "=" in w})
    except TypeError:
        return False
    return True

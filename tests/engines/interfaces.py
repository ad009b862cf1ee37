"""Say what classes of an engine, and ours that plug into it, look like, as JSON.

Run by a Python that has what the engine needs, with the engine's unpacked wheel first on PYTHONPATH and this repository
behind it. On stdin the engine and the classes, each as ``MODULE:NAME``; on stdout one line, see `describe`.
"""

# pyright: basic, reportMissingImports=false
# ruff: noqa: PLC0415 - imports need what prepare() does
from __future__ import annotations

import contextlib
import dataclasses
import dis
import importlib
import inspect
import json
import os
import sys
from typing import Any


def prepare(engine: str) -> None:
    """What has to come before the engine's modules are imported; vLLM loads our plug-in in all its processes."""
    if engine == "sglang":
        from tests.engines import sglang_storage

        sglang_storage.prepare()
    elif engine == "vllm":
        from distprefix.engines import vllm_plugin

        vllm_plugin.register()


def spelled(signature: inspect.Signature) -> str:
    """Names of parameters as they are written in Python, those that may be left out with a ``=``."""
    words: list[str] = []
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    is_keyword_only = False
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not is_keyword_only:
            words.append("*")
        is_keyword_only = is_keyword_only or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        words.append(stars.get(each.kind, "") + each.name + ("" if each.default is each.empty else "="))
    return " ".join(words)


def describe(target: str) -> dict[str, Any]:
    """Where a class or a function comes from, and what it has.

    methods: parameters by name, "property" for a property, "()" for how it is called. Of a class also its abstract
    methods, own: public names that distprefix defines, and names: all that it has, or that its methods store in it.
    """
    module_name, name = target.split(":")
    module = importlib.import_module(module_name)
    owner = getattr(module, name)
    methods: dict[str, str] = {}
    with contextlib.suppress(ValueError):  # compiled
        methods["()"] = spelled(inspect.signature(owner))
    described: dict[str, Any] = {"file": module.__file__, "methods": methods}
    if not inspect.isclass(owner):
        return described
    names = set(dir(owner))
    if dataclasses.is_dataclass(owner):
        names.update(field.name for field in dataclasses.fields(owner))
    for each in dir(owner):
        found = inspect.getattr_static(owner, each)
        function = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
        if isinstance(found, property):
            methods[each] = "property"
        elif inspect.isfunction(function) and not each.startswith("__"):
            methods[each] = spelled(inspect.signature(function))
    own: set[str] = set()
    for base in owner.__mro__:
        for function in filter(inspect.isfunction, vars(base).values()):
            names.update(each.argval for each in dis.get_instructions(function) if each.opname == "STORE_ATTR")
        if base.__module__.startswith("distprefix."):
            own.update(each for each in vars(base) if not each.startswith("_"))
    abstract = sorted(getattr(owner, "__abstractmethods__", ()))
    return {**described, "abstract": abstract, "own": sorted(own), "names": sorted(names)}


if __name__ == "__main__":
    order = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # engines like to talk
        prepare(order["engine"])
        json.dump({target: describe(target) for target in order["targets"]}, answer)

"""What scripts in engines' environments share: orders on stdin, answers on stdout, warnings that were logged.

Every line on stdin is an order and gets one line on stdout, both JSON: ``{"do": NAME, ...}``; what fails is answered
with ``{"error": ...}``.
"""

# pyright: basic
from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["parameters", "said", "serve"]


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


_warnings = _Warnings()


def said() -> dict[str, Any]:
    """Warnings since the last time."""
    lines, _warnings.lines = _warnings.lines, []
    return {"said": lines}


def parameters(owner: Any) -> dict[str, list[str]]:
    """A class's public methods, and the parameters of each."""
    found = inspect.getmembers(owner, inspect.isfunction)
    return {name: list(inspect.signature(f).parameters) for name, f in found if not name.startswith("_")}


def serve(orders: Mapping[str, Callable[..., Any]], prepare: Callable[[], object] = lambda: None) -> None:
    """Serve orders until there are no more, once `prepare` is done."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as answers:
        os.dup2(2, 1)  # stdout is for answers only
        logging.getLogger("distprefix").addHandler(_warnings)
        prepare()
        answers.write(json.dumps({"ready": True}) + "\n")
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = orders[order.pop("do")](**order)
            except Exception as error:  # noqa: BLE001 - whoever ordered is to know
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")

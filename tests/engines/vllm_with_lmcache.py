"""vllm_engine.py in an environment that has LMCache as well: the same options and orders.

vLLM 0.32 for CPUs looks at the `__dict__` of whatever modules hold when it starts. llvmlite, which comes with LMCache's
numba, has a library among these that answers every name with a function; here it no longer does for names of Python's.
"""

# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false
from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from llvmlite.binding import ffi

_find = ffi._lib_wrapper.__getattr__


def _found(self: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _find(self, name)


if __name__ == "__main__":
    ffi._lib_wrapper.__getattr__ = _found
    runpy.run_path(str(Path(__file__).with_name("vllm_engine.py")), run_name="__main__")

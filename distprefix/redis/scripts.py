"""The Lua scripts: found beside the package or in the source tree, put together from parts, named by SHA-1.

``lua/MANIFEST`` lists these names, so that a change of any part shows. A test holds it to the scripts; renew it with
``python -m distprefix.redis.manifest > lua/MANIFEST``.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

__all__ = ["SCRIPTS", "Script", "load_script", "policy_names"]

SCRIPTS = (
    "attach",
    "census",
    "claim",
    "disprove",
    "drop",
    "dropped",
    "enroll",
    "erase",
    "evict",
    "feed",
    "forget",
    "guess",
    "heartbeat",
    "hot",
    "idle",
    "ingest",
    "insert",
    "lease",
    "move",
    "prewarm",
    "register",
    "repair",
    "report",
    "restored",
    "retire",
    "roster",
    "settled",
    "store",
    "stream",
    "sweep",
    "touch",
    "trim",
    "turn",
    "used",
    "walk",
    "where",
)
_INCLUDE = re.compile(r"^-- @include (\w+)\n", re.MULTILINE)


class Script(NamedTuple):
    """A script as it is loaded into a server."""

    name: str
    body: str
    sha: str
    reads_only: bool
    tells_damage: bool
    """Whether its reply ends with the damaged places that it passed over, where there are any."""


@cache
def _folder() -> Traversable:
    inside = files("distprefix") / "lua"  # in a wheel
    return inside if inside.is_dir() else Path(__file__).parents[2] / "lua"  # in a checkout


@cache
def policy_names() -> tuple[str, ...]:
    """The eviction policies: the files in ``lua/policies``. Every script that ranks leaves knows all of them."""
    names = (item.name.removesuffix(".lua") for item in (_folder() / "policies").iterdir())
    return tuple(sorted(name for name in names if not name.startswith(".")))


@cache
def load_script(name: str, *, with_flags: bool = True) -> Script:
    """The script with its parts put in. Without flags for servers that do not know the ``#!lua`` line."""
    folder = _folder()

    def part(match: re.Match[str]) -> str:
        if match[1] == "policies":
            return "local policies = {}\n" + "".join(
                (folder / "policies" / f"{policy}.lua").read_text(encoding="utf-8") for policy in policy_names()
            )
        return (folder / "shared" / f"{match[1]}.lua").read_text(encoding="utf-8")

    body = _INCLUDE.sub(part, (folder / f"{name}.lua").read_text(encoding="utf-8"))
    first, _, rest = body.partition("\n")
    if not with_flags:
        body = rest
    sha = hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()
    return Script(name, body, sha, "no-writes" in first, "\nlocal damaged = 0" in body)

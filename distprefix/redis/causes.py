"""What a server's refusals are counted by, the same on the control path and on the data path."""

from __future__ import annotations

__all__ = ["NOT_SERVING", "cause_of_code"]

NOT_SERVING = ("READONLY", "LOADING", "MASTERDOWN")
"""Errors after which a connection may lead to the wrong server."""
_CAUSES = {
    "OOM": "out of memory",
    "NOAUTH": "auth",
    "WRONGPASS": "auth",
    "NOPERM": "permission",
    **{code: code.lower() for code in (*NOT_SERVING, "ERR", "MISCONF", "NOREPLICAS", "WRONGTYPE")},
    **{code: code.lower() for code in ("BUSY", "CLUSTERDOWN")},
}


def cause_of_code(code: str) -> str:
    """What a reply that is an error is counted by: its code's name, and ``refused`` for a code that is not known."""
    return _CAUSES.get(code, "refused")

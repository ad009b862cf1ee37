"""What a server's refusals are counted by, the same on the control path and on the data path."""

from __future__ import annotations

__all__ = ["NOT_SERVING", "cause_of_code", "without_echo"]

NOT_SERVING = ("READONLY", "LOADING", "MASTERDOWN")
"""Errors after which a connection may lead to the wrong server."""
_SHORTEST_ECHO = 8
"""Characters of a password that are looked for: servers cut what they repeat."""
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


def without_echo(text: str, password: str) -> str:
    """What a server answered to a greeting, without its words where they may repeat the password that it was sent."""
    if "args beginning with" in text or (password and password[:_SHORTEST_ECHO] in text):
        return f"{text.partition(' ')[0]} (the server's words may repeat the password: they are not shown)"
    return text

"""Everything distprefix raises, below one base class."""

from __future__ import annotations

from distprefix.printable import printable

__all__ = [
    "ConfigError",
    "DamagedNodeError",
    "DamagedPayloadError",
    "DistPrefixError",
    "EmbeddedServerError",
    "EventFormatError",
    "FencedError",
    "ForkedProcessError",
    "InvalidInputError",
    "LostHistoryError",
    "NamespaceError",
    "NoParentError",
    "NotAttachedError",
    "OrphansError",
    "ReplayError",
    "SchemaError",
    "ScriptError",
    "ScriptsMissingError",
    "StaleEpochError",
    "TraceError",
    "UnavailableError",
    "UnreadablePayloadError",
]


_LONGEST_MESSAGE = 4000


class DistPrefixError(Exception):
    """Base of every exception of this package. What a message quotes of others is escaped: it is one printable line."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(printable(message or type(self).__doc__ or "", _LONGEST_MESSAGE))


class ConfigError(DistPrefixError, ValueError):
    """A configuration value is not allowed; the message names the field, the value and what is allowed."""


class InvalidInputError(DistPrefixError, ValueError):
    """Tokens, chains or block ids that cannot be used; the message says what to pass instead."""


class TraceError(DistPrefixError, ValueError):
    """A trace file that is not a trace; the message names the file, the line and the reason."""


class EventFormatError(DistPrefixError, ValueError):
    """A message of an engine that is no batch of KV events; the message says what it is instead."""


class NamespaceError(DistPrefixError):
    """The namespace was made with other settings; the message names them."""


class UnreadablePayloadError(DistPrefixError):
    """A stored payload arrived as it was written, and this process cannot open it: it has another key or library."""


class DamagedPayloadError(DistPrefixError):
    """Stored KV bytes that are not what was stored for their chunk, or cannot be decrypted. They count as missing."""


class EmbeddedServerError(DistPrefixError):
    """The private server cannot be found or started; the message says what to install."""


class ForkedProcessError(DistPrefixError):
    """This cache was opened before a fork: its connections and threads belong to the parent. Open one in the child."""


class UnavailableError(DistPrefixError):
    """Redis did not give a usable answer in time. Look-ups become misses; only ``strict=True`` raises this."""

    is_full = False
    """Whether a write was refused because the server is at its maxmemory."""


class ScriptsMissingError(UnavailableError):
    """The server does not know our scripts and this user may not load them: run `distprefix provision` there."""


class ReplayError(DistPrefixError):
    """The engine could not replay what is missing; the message says why. What it holds is then not known."""


class ScriptError(DistPrefixError):
    """A script refused a call, or the server refused the script."""


class SchemaError(ScriptError):
    """The tree was written by another schema version (DPSCHEMA)."""


class NotAttachedError(ScriptError):
    """The namespace is gone from Redis, as after a FLUSHALL; it is attached again by itself (DPGONE)."""


class NoParentError(ScriptError):
    """The node that a chain goes on from is gone; it is published from the root instead (DPNOPARENT)."""


class OrphansError(ScriptError):
    """Children of lost nodes were in the way: some of them are removed, and the call is to be repeated (DPAGAIN)."""


class StaleEpochError(ScriptError):
    """A newer process has this worker id: stop this one, or give it a ``worker_id`` of its own (DPSTALE)."""


class FencedError(ScriptError):
    """Another ingester has taken over the stream; this one stands by (DPFENCED)."""


class LostHistoryError(ScriptError):
    """The server does not have all that it acknowledged, as after a restore (DPLOST)."""


class DamagedNodeError(ScriptError):
    """A radix node in Redis does not hold what its key says (DPDAMAGED)."""

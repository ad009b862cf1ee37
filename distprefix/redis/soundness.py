"""Whether the values of a shard can be: those of one node by themselves, and of the lists beside the tree."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple, cast

import redis

from distprefix.redis.keys import Keys
from distprefix.redis.replies import count_of, is_chunk_name, pairs

__all__ = ["Fix", "as_bytes", "as_text", "check_lists", "check_node", "payload_sizes", "read_hash"]

_TIERS = (b"@warm", b"@cold")
_MAX_WAITING_BYTES = 256 * 16


class Fix(NamedTuple):
    """A command that takes out, or corrects, what cannot be."""

    command: str
    key: bytes
    args: tuple[bytes, ...] = ()


def as_text(name: bytes) -> str:
    """A key, field or member for messages and dictionaries, whatever bytes it has."""
    return name.decode(errors="surrogateescape")


def as_bytes(name: str) -> bytes:
    """What `as_text` was given."""
    return name.encode(errors="surrogateescape")


def read_hash(client: redis.Redis, name: str) -> dict[bytes, bytes] | None:
    """A hash; None for a key that is none."""
    try:
        reply: Any = client.execute_command("HGETALL", as_bytes(name))
    except redis.ResponseError:
        return None
    return pairs(reply)


def payload_sizes(column: bytes) -> array[int]:
    """The sizes in a column of payloads, as many as there are in full."""
    return array("I", column[: len(column) // 4 * 4])


def check_node(key: str, head: str, node: dict[bytes, bytes], max_run: int) -> tuple[list[str], list[Fix], bool]:
    """What is wrong with a node by itself, what corrects it, and whether it can stay as a node at all."""
    run = node.get(b"r", b"")
    size = len(run) // 16
    if len(run) % 16 or not 0 < size <= max_run or run[:16].hex() != head:
        return [f"node {head} has a damaged run of {len(run)} bytes"], [], False
    parent = node.get(b"p", b"")
    if parent and not is_chunk_name(parent):
        return [f"node {head} names as its parent {parent[:40]!r}"], [], False
    problems: list[str] = []
    fixes: list[Fix] = []
    for name, what in ((b"a", "last access"), (b"n", "hits"), (b"c", "creation")):
        if count_of(node.get(name, b"0"), -1) < 0:
            problems.append(f"node {head}: its {what} is {node[name][:40]!r}")
            fixes.append(Fix("HSET", as_bytes(key), (name, b"0")))
    stays = True
    for name in node:
        wrong = _check_coverage(head, node, name, size) if name[:2] in (b"h:", b"b:", b"e:") else []
        problems += wrong
        if wrong and name[2:] in _TIERS:
            stays = False  # its payloads go with it
        elif wrong:
            fixes.append(Fix("HDEL", as_bytes(key), tuple(kind + name[2:] for kind in (b"h:", b"b:", b"e:"))))
    return problems, fixes, stays


def _check_coverage(head: str, node: dict[bytes, bytes], name: bytes, size: int) -> list[str]:
    """What is wrong with a holder's coverage or a column of it."""
    text = as_text(name)
    if b"@" not in name:
        return [f"node {head}: {text} names no holder"]
    epoch, _, chunks = node.get(b"h:" + name[2:], b"").partition(b":")
    covered = count_of(chunks, -1)
    if count_of(epoch, -1) < 0 or covered < 0:
        return [f"node {head}: {text} is {node[name][:40]!r}"] if name[:2] == b"h:" else []
    if name[:2] == b"h:":
        return [] if 0 < covered <= size else [f"node {head}: {text} covers {covered} of {size}"]
    length = len(node[name])
    if name[:2] == b"b:" and (length > 4 * covered or length % 4):
        return [f"node {head}: {text} has more block ids than coverage"]
    if name[:2] == b"e:" and (not covered or length % (8 * covered)):
        return [f"node {head}: {text} has not as many keys as coverage"]
    return []


def check_lists(client: redis.Redis, keys: Keys) -> tuple[list[str], list[Fix]]:
    """What is wrong with the keys of a shard beside its nodes and junctions. A dozen calls, and one for each list."""
    problems: list[str] = []
    fixes: list[Fix] = []
    kinds = {
        keys.leaves: b"zset",
        keys.hot: b"zset",
        keys.log: b"stream",
        keys.holders: b"hash",
        keys.writers: b"hash",
        keys.trash: b"set",
        keys.kept: b"set",
        keys.unsettled: b"hash",
    }
    sound: set[str] = set()
    for name, kind in kinds.items():
        found: Any = client.execute_command("TYPE", name)
        if found in (kind, b"none"):
            sound.add(name)
        else:
            problems.append(f"{name} is no {kind.decode()}")
            fixes.append(Fix("UNLINK", as_bytes(name)))
    for name in sorted(sound & {keys.trash, keys.kept}):
        members = cast("list[bytes]", client.execute_command("SMEMBERS", name))
        wrong = [each for each in members if not is_chunk_name(each)]
        problems += [f"{name} names {member[:40]!r}, which is no chunk" for member in wrong]
        fixes += [Fix("SREM", as_bytes(name), (member,)) for member in wrong]
    waiting = (read_hash(client, keys.unsettled) or {}).items()
    wrong = [each for each, chunks in waiting if len(chunks) % 16 or not 0 < len(chunks) <= _MAX_WAITING_BYTES]
    problems += [f"{keys.unsettled} names for {field[:40]!r} what is no chunks" for field in wrong]
    fixes += [Fix("HDEL", as_bytes(keys.unsettled), (field,)) for field in wrong]
    log = (read_hash(client, keys.meta) or {}).get(b"log", b"0")
    if count_of(log, -1) < 0:
        problems.append(f"meta counts {log[:40]!r} entries of the log")
        fixes.append(Fix("HSET", as_bytes(keys.meta), (b"log", b"0")))
    epochs = (read_hash(client, keys.epochs) or {}).items()
    wrong = [member for member, epoch in epochs if count_of(epoch, -1) < 0]
    problems += [f"the epoch of {as_text(member)} is no number" for member in wrong]
    fixes += [Fix("HDEL", as_bytes(keys.epochs), (member,)) for member in wrong]
    return problems, fixes

"""Read a whole shard and hold it to its invariants. Plain commands, for tests and for whoever doubts."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import redis

from distprefix.printable import printable
from distprefix.redis.keys import Keys
from distprefix.redis.replies import is_wrong_type, pairs, whole
from distprefix.tiers.envelope import HEADER_BYTES, PART_BYTES, upload_of

__all__ = ["Report", "check_integrity", "check_payloads"]


_LONGEST_PROBLEM = 500


@dataclass(slots=True)
class Report:
    """What was found; an empty `problems` means that the shard is sound."""

    nodes: int = 0
    chunks: int = 0
    bytes: int = 0
    """By the scripts' own estimate."""
    warm: int = 0
    """Of these, payloads."""
    cold: int = 0
    """Bytes of cold payloads."""
    problems: list[str] = field(default_factory=list[str])
    """Printable lines. The other fields name what is there exactly: bytes that are no UTF-8 are surrogates."""
    orphans: list[str] = field(default_factory=list[str])
    """Heads of nodes that have lost their parent."""
    strays: list[str] = field(default_factory=list[str])
    """What `leaves` or `hot` name and is no leaf, or no node."""
    childless: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Junctions by last chunk, and the children that they name and that are not there."""
    missing: dict[str, int] = field(default_factory=dict[str, int])
    """Leaves that `leaves` does not name, with their last access in ms."""
    miscounted: list[tuple[str, str, int]] = field(default_factory=list[tuple[str, str, int]])
    """Junctions by last chunk ("root" for the roots), a holder, and how many of the children it covers in truth."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check_payloads(client: redis.Redis, keys: Keys, cold: redis.Redis | None = None) -> list[str]:
    """Every payload that the tree names is there with its size, and no other stays. Costs a SCAN and a call a key.

    `cold`: the other server, where the cold ones lie on one. What waits in the trash may still be there, and what waits
    to be settled may still have a TTL.
    """
    problems: list[str] = []
    trash = _ask(client, problems, "SMEMBERS", keys.trash)
    waiting = _ask(client, problems, "HVALS", keys.unsettled)
    allowed = {_name(chunk) for chunk in trash}
    unsettled = {chunks[at : at + 16].hex() for chunks in waiting for at in range(0, len(chunks), 16)}
    for tier, kind, server in (("@warm", "kv", client), ("@cold", "cold", cold or client)):
        wanted = _wanted(client, keys, f"b:{tier}".encode())
        there = _there(server, keys, kind)
        for chunk, size in wanted.items():
            values = there.get(chunk, _Values())
            found = values.whole
            if found != size:
                problems.append(f"{kind}:{chunk} has {found} bytes, not {size}")
            expiring = values.named & (set(values.lengths) - values.staying)
            if kind == "cold" and chunk in unsettled:
                continue
            problems += [f"{kind}:{chunk}{part} is named and has a TTL" for part in sorted(expiring)]
        for chunk, values in sorted(there.items()):
            named = values.named if chunk in wanted or chunk in allowed else set[str]()
            lone = values.staying - named
            problems += [f"{kind}:{chunk}{part} stays and belongs to nothing" for part in sorted(lone)]
    return [printable(problem, _LONGEST_PROBLEM) for problem in problems]


@dataclass(slots=True)
class _Values:
    """The values of one chunk: the first is named "", the others ":<upload>:<number>"."""

    lengths: dict[str, int] = field(default_factory=dict[str, int])
    staying: set[str] = field(default_factory=set[str])
    """Those without a TTL."""
    header: bytes = b""

    @property
    def named(self) -> set[str]:
        """The first value, and the parts of the upload that it names."""
        named = {""}
        if self.lengths.get("", 0) >= PART_BYTES and len(self.header) == HEADER_BYTES:
            upload, values = upload_of(self.header)
            named |= {f":{upload.hex()}:{number}" for number in range(1, values)}
        return named

    @property
    def whole(self) -> int:
        """Bytes of the payload that the first value names; 0 where a part is missing."""
        named = self.named
        return sum(self.lengths[part] for part in named) if named <= set(self.lengths) else 0


def _wanted(client: redis.Redis, keys: Keys, column: bytes) -> dict[str, int]:
    """Chunks to the sizes that the tree names."""
    wanted: dict[str, int] = {}
    for name in _scan(client, f"{keys.base}n:"):
        fields = _read(client, name) or {}
        run = fields.get(b"r", b"")
        for i, size in enumerate(_numbers(fields.get(column, b""))):
            if size:
                wanted[run[16 * i : 16 * i + 16].hex()] = size
    return wanted


def _there(server: redis.Redis, keys: Keys, kind: str) -> dict[str, _Values]:
    """Chunks to the values under their names."""
    there: dict[str, _Values] = {}
    base = f"{keys.base}{kind}:"
    for name in _scan(server, base):
        chunk, _, part = name.removeprefix(base).partition(":")
        values = there.setdefault(chunk, _Values())
        part = f":{part}" if part else ""
        key = _key(name)
        try:
            values.lengths[part] = cast("int", server.execute_command("STRLEN", key))
            if not part:
                values.header = cast("bytes", server.execute_command("GETRANGE", key, 0, HEADER_BYTES - 1))
        except redis.ResponseError:  # of another type
            values.lengths[part] = 0
        if server.execute_command("PTTL", key) == -1:
            values.staying.add(part)
    return there


def check_integrity(client: redis.Redis, keys: Keys, max_run: int = 256) -> Report:
    """Every node has its parent, junctions and leaves agree, runs and coverage are in bounds, all counts are exact.

    Meaningful while nobody writes. Costs a SCAN of the server and one HGETALL for every key of the shard.
    """
    report = Report()
    problems = report.problems
    nodes: dict[str, dict[bytes, bytes]] = {}
    junctions: dict[str, dict[bytes, bytes]] = {}
    for name in _scan(client, keys.base):
        kind, _, rest = name.removeprefix(keys.base).partition(":")
        if kind in ("n", "j"):
            fields = _read(client, name)
            if fields is None:
                problems.append(f"{name} is no hash")
            elif kind == "n":
                nodes[rest] = fields
            else:
                junctions[rest] = fields
    children: dict[str, set[str]] = {}
    owners: dict[str, str] = {}
    for head, node in nodes.items():
        run = node.get(b"r", b"")
        report.nodes += 1
        report.chunks += len(run) // 16
        if len(run) % 16 or not 0 < len(run) // 16 <= max_run or run[:16].hex() != head:
            problems.append(f"node {head} has a damaged run of {len(run)} bytes")
            continue
        owners[run[-16:].hex()] = head
        children.setdefault(_name(node.get(b"p", b"")) or "root", set()).add(head)
        report.bytes += _weigh(node)
        report.warm += _payloads(node, b"b:@warm")
        report.cold += _payloads(node, b"b:@cold")
        problems += _check_coverage(head, node, len(run) // 16)
    _check_links(nodes, junctions, children, owners, problems)
    newest = _read(client, keys.epochs) or {}
    for head in owners.values():
        above = nodes.get(owners.get(_name(nodes[head].get(b"p", b"")), ""))
        problems += _check_closed(head, nodes[head], above, newest) if above else []
    _check_leaves(client, keys, nodes, junctions, children, owners, report)
    _check_counts(nodes, {**junctions, "root": _read(client, keys.holders) or {}}, children, report)
    meta: dict[bytes, bytes] = _read(client, keys.meta) or {}
    for name, count in (
        ("nodes", report.nodes),
        ("chunks", report.chunks),
        ("bytes", report.bytes),
        ("warm", report.warm),
        ("cold", report.cold),
    ):
        told = meta.get(name.encode(), b"0")
        if told != b"%d" % count:
            problems.append(f"meta counts {printable(told)} {name}, there are {count}")
    report.problems = [printable(problem, _LONGEST_PROBLEM) for problem in problems]
    return report


def _check_leaves(
    client: redis.Redis,
    keys: Keys,
    nodes: dict[str, dict[bytes, bytes]],
    junctions: dict[str, dict[bytes, bytes]],
    children: dict[str, set[str]],
    owners: dict[str, str],
    report: Report,
) -> None:
    problems = report.problems
    leaves = {_name(member) for member in _ask(client, problems, "ZRANGE", keys.leaves, 0, -1)}
    hot = [_name(member) for member in _ask(client, problems, "ZRANGE", keys.hot, 0, -1)]
    strangers = [head for head in hot if head not in nodes]
    problems += [f"hot names {head}, which is no node" for head in strangers]
    expected = {head for last, head in owners.items() if last not in children}
    report.missing = {head: whole(nodes[head].get(b"a")) for head in expected - leaves}
    report.strays = [*sorted(leaves - expected), *strangers]
    for last, junction in junctions.items():
        gone = _children(junction) - children.get(last, set())
        if gone or last not in children:
            report.childless[last] = sorted(gone)
    report.orphans = [head for head, node in nodes.items() if _is_orphan(node, owners)]
    problems += [f"leaf {head} is not in leaves" for head in sorted(expected - leaves)]
    problems += [f"leaves names {head}, which is no leaf" for head in sorted(leaves - expected)]


def _children(junction: dict[bytes, bytes]) -> set[str]:
    """The heads that a junction names; its other fields are the owner, and holders, which all contain "@"."""
    return {_name(name) for name in junction if name != b"o" and b"@" not in name}


def _check_counts(
    nodes: dict[str, dict[bytes, bytes]],
    counts: dict[str, dict[bytes, bytes]],
    children: dict[str, set[str]],
    report: Report,
) -> None:
    """A junction counts for each holder how many of its children it covers; `holders` does so for the roots."""
    for last in sorted({*counts, *children}):
        covered = Counter(name[2:] for head in children.get(last, ()) for name in nodes[head] if name.startswith(b"h:"))
        counted = {name: value for name, value in counts.get(last, {}).items() if b"@" in name}
        for holder in sorted({*covered, *counted}):
            told = counted.get(holder, b"0")
            true = covered[holder]
            if told != b"%d" % true or (holder in counted) != bool(true):
                name = _name(holder)
                report.miscounted.append((last, name, true))
                report.problems.append(f"junction {last} counts {told!r} children that {name} covers, there are {true}")


def _is_orphan(node: dict[bytes, bytes], owners: dict[str, str]) -> bool:
    parent = _name(node.get(b"p", b""))
    return bool(parent) and parent not in owners


def _weigh(node: dict[bytes, bytes]) -> int:
    """What `lua/shared/account.lua` estimates for a node."""
    holders = sum(name.startswith(b"h:") for name in node)
    extra = sum(len(value) for name, value in node.items() if name == b"m" or name[:2] in (b"b:", b"e:"))
    return 700 + len(node[b"r"]) + 70 * holders + extra + _payloads(node, b"b:@warm")


def _payloads(node: dict[bytes, bytes], column: bytes) -> int:
    """Bytes of a node's payloads in a tier, as the script that found them there counted them."""
    return sum(_numbers(node.get(column, b"")))


def _check_coverage(head: str, node: dict[bytes, bytes], size: int) -> list[str]:
    problems: list[str] = []
    for name, value in node.items():
        if name.startswith(b"h:"):
            epoch, _, chunks = value.partition(b":")
            if not epoch.isdigit() or not chunks.isdigit():
                problems.append(f"node {head}: {_name(name)} is {value!r}")
                continue
            covered = whole(chunks)
            if not 0 < covered <= size:
                problems.append(f"node {head}: {_name(name)} covers {printable(chunks)} of {size}")
                continue
            if len(node.get(b"b:" + name[2:], b"")) > 4 * covered:
                problems.append(f"node {head}: {_name(name)} has more block ids than coverage")
            if len(node.get(b"e:" + name[2:], b"")) % (8 * covered):
                problems.append(f"node {head}: {_name(name)} has not as many keys as coverage")
    return problems


def _check_closed(
    head: str, node: dict[bytes, bytes], above: dict[bytes, bytes], newest: dict[bytes, bytes]
) -> list[str]:
    """Who covers a node covers all of its parent; coverage under an older epoch counts for nothing, here as well."""
    problems: list[str] = []
    for name, value in node.items():
        epoch, end = value.partition(b":")[0], len(above[b"r"]) // 16
        counts = name.startswith(b"h:") and newest.get(name[2:].partition(b"@")[0], epoch) == epoch
        whole = b"%s:%d" % (epoch, end)
        if name == b"h:@cold" and whole in (above.get(b"h:@warm"), above.get(name)):
            continue  # what is cold has warm or cold ones above it
        if counts and above.get(name) != whole:
            problems.append(f"node {head}: {_name(name)} does not cover the parent")
    return problems


def _check_links(
    nodes: dict[str, dict[bytes, bytes]],
    junctions: dict[str, dict[bytes, bytes]],
    children: dict[str, set[str]],
    owners: dict[str, str],
    problems: list[str],
) -> None:
    for last, heads in children.items():
        junction = junctions.get(last, {})
        named = _children(junction)
        problems += [f"node {head} has no parent" for head in sorted(heads) if last != "root" and last not in owners]
        if named != heads:
            problems.append(f"junction {last} names {sorted(named)}, its children are {sorted(heads)}")
        owner = _name(junction.get(b"o", b""))
        if last != "root" and owner != owners.get(last):
            problems.append(f"junction {last} is owned by {owner or 'nobody'}, not by {owners.get(last)}")
        for head in heads:
            parent = owners.get(last)
            above = whole(nodes[parent].get(b"d")) + len(nodes[parent][b"r"]) // 16 if parent else 0
            if nodes[head].get(b"d") != b"%d" % above and (parent or last == "root"):
                problems.append(f"node {head} lies at depth {nodes[head].get(b'd')!r}, not {above}")
    problems += [f"junction {last} has no children" for last in junctions if last not in children]


def _scan(client: redis.Redis, base: str) -> list[str]:
    pattern = base.replace("[", "\\[").replace("]", "\\]") + "*"
    return sorted({_name(name) for name in client.scan_iter(match=pattern, count=1000)})


def _read(client: redis.Redis, name: str) -> dict[bytes, bytes] | None:
    try:
        reply: Any = client.execute_command("HGETALL", _key(name))
    except redis.ResponseError:
        return None
    return pairs(reply)


def _ask(client: redis.Redis, problems: list[str], command: str, name: str, *args: int) -> Any:
    """The items of a key; none, and a problem, where the key has another type."""
    try:
        return client.execute_command(command, name, *args)
    except redis.ResponseError as error:
        if not is_wrong_type(error):
            raise
        problems.append(f"{name} has another type")
        return []


def _name(data: bytes) -> str:
    """A name, whatever bytes it has."""
    return data.decode(errors="surrogateescape")


def _key(name: str) -> bytes:
    """What `_name` read."""
    return name.encode(errors="surrogateescape")


def _numbers(column: bytes) -> array[int]:
    """A column of a node; what is no whole number at its end is left out."""
    return array("I", column[: len(column) // 4 * 4])

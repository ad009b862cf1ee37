"""Read a whole shard and hold it to its invariants. Plain commands, for tests and for whoever doubts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import redis

from distprefix.printable import printable
from distprefix.redis.keys import Keys
from distprefix.redis.replies import count_of, is_chunk_name, is_wrong_type
from distprefix.redis.soundness import (
    Fix,
    as_bytes,
    as_text,
    check_lists,
    check_node,
    payload_sizes,
    read_hash,
)
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
    """Printable lines. The other fields name what is there exactly."""
    orphans: list[str] = field(default_factory=list[str])
    """Heads of nodes that do not hang from a root: the parent is lost, they lie below themselves, or are none."""
    strays: list[str] = field(default_factory=list[str])
    """What `leaves` or `hot` name and is no leaf, or no node."""
    childless: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Junctions by last chunk, and the children that they name and that are not there."""
    missing: dict[str, int] = field(default_factory=dict[str, int])
    """Leaves that `leaves` does not name, with their last access in ms."""
    fixes: list[Fix] = field(default_factory=list[Fix])
    """What takes out or corrects values that cannot be."""
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
    allowed = {as_text(chunk) for chunk in trash}
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
        fields = read_hash(client, name) or {}
        run = fields.get(b"r", b"")
        for i, size in enumerate(payload_sizes(fields.get(column, b""))):
            if size:
                wanted[run[16 * i : 16 * i + 16].hex()] = size
    return wanted


def _ask(client: redis.Redis, problems: list[str], command: str, name: str) -> Any:
    """The items of a key; none, and a problem, where the key has another type."""
    try:
        return client.execute_command(command, name)
    except redis.ResponseError as error:
        if not is_wrong_type(error):
            raise
        problems.append(f"{name} has another type")
        return []


def _there(server: redis.Redis, keys: Keys, kind: str) -> dict[str, _Values]:
    """Chunks to the values under their names."""
    there: dict[str, _Values] = {}
    base = f"{keys.base}{kind}:"
    for name in _scan(server, base):
        chunk, _, part = name.removeprefix(base).partition(":")
        values = there.setdefault(chunk, _Values())
        part = f":{part}" if part else ""
        try:
            values.lengths[part] = cast("int", server.execute_command("STRLEN", as_bytes(name)))
            if not part:
                values.header = cast("bytes", server.execute_command("GETRANGE", as_bytes(name), 0, HEADER_BYTES - 1))
        except redis.ResponseError:  # of another type
            values.lengths[part] = 0
        if server.execute_command("PTTL", as_bytes(name)) == -1:
            values.staying.add(part)
    return there


def check_integrity(client: redis.Redis, keys: Keys, max_run: int = 256) -> Report:
    """Every node has its parent, junctions and leaves agree, runs and coverage are in bounds, all counts are exact.

    Meaningful while nobody writes. Whatever the values are, they are reported. Costs a SCAN of the server and one
    HGETALL for every key of the shard. Raises what redis-py raises.
    """
    report = Report()
    nodes: dict[str, dict[bytes, bytes]] = {}
    junctions: dict[str, dict[bytes, bytes]] = {}
    _read_shard(client, keys, nodes, junctions, report)
    damaged = _check_nodes(keys, nodes, max_run, report)
    owners = _owners(nodes, junctions, damaged, report)
    children: dict[str, set[str]] = {}
    for head, node in nodes.items():
        if head not in damaged:
            children.setdefault(as_text(node.get(b"p", b"")) or "root", set()).add(head)
    depths = _depths(nodes, children)
    report.orphans = [head for head in nodes if head not in depths]
    _check_links(keys, nodes, junctions, children, owners, depths, report)
    newest = read_hash(client, keys.epochs) or {}
    for head in depths:
        above = nodes.get(owners.get(as_text(nodes[head].get(b"p", b"")), ""))
        if above:
            _check_closed(keys, head, nodes[head], above, newest, report)
    _check_leaves(client, keys, nodes, junctions, children, owners, report)
    _check_counts(nodes, {**junctions, "root": read_hash(client, keys.holders) or {}}, children, report)
    problems, fixes = check_lists(client, keys)
    report.problems += problems
    report.fixes += fixes
    _check_meta(read_hash(client, keys.meta) or {}, report)
    report.problems = [printable(problem, _LONGEST_PROBLEM) for problem in report.problems]
    return report


def _read_shard(
    client: redis.Redis,
    keys: Keys,
    nodes: dict[str, dict[bytes, bytes]],
    junctions: dict[str, dict[bytes, bytes]],
    report: Report,
) -> None:
    """Read all nodes by head, and all junctions by last chunk; what is neither is to be removed."""
    for name in _scan(client, keys.base):
        kind, _, rest = name.removeprefix(keys.base).partition(":")
        if kind not in ("n", "j"):
            continue
        fields = read_hash(client, name)
        is_named = is_chunk_name(as_bytes(rest)) or (kind == "j" and rest == "root")
        if fields is None or not is_named:
            report.problems.append(f"{name} is no hash" if fields is None else f"{name} is named by no chunk")
            report.fixes.append(Fix("UNLINK", as_bytes(name)))
        elif kind == "n":
            nodes[rest] = fields
        else:
            junctions[rest] = fields


def _check_nodes(keys: Keys, nodes: dict[str, dict[bytes, bytes]], max_run: int, report: Report) -> set[str]:
    """Check each node by itself, and count what there is. Returns those that can be no nodes."""
    damaged: set[str] = set()
    for head, node in nodes.items():
        problems, fixes, stays = check_node(keys.node(head), head, node, max_run)
        report.problems += problems
        report.fixes += fixes
        report.nodes += 1
        report.chunks += len(node.get(b"r", b"")) // 16
        if not stays:
            damaged.add(head)
        report.bytes += _weigh(node)
        report.warm += _payloads(node, b"b:@warm")
        report.cold += _payloads(node, b"b:@cold")
    return damaged


def _owners(
    nodes: dict[str, dict[bytes, bytes]], junctions: dict[str, dict[bytes, bytes]], damaged: set[str], report: Report
) -> dict[str, str]:
    """Last chunks to the heads of the nodes that end with them; of two the one that the junction names, then another.

    What ends with the same chunk as another node is added to `damaged`: it would have the same children.
    """
    owners: dict[str, str] = {}
    for head in sorted(nodes.keys() - damaged):
        last = nodes[head][b"r"][-16:].hex()
        other = owners.get(last)
        if other is None:
            owners[last] = head
            continue
        keeps_other = junctions.get(last, {}).get(b"o", b"").decode(errors="replace") != head
        lost = head if keeps_other else other
        owners[last] = other if keeps_other else head
        damaged.add(lost)
        report.problems.append(f"node {lost} ends with the same chunk as node {owners[last]}")
    return owners


def _depths(nodes: dict[str, dict[bytes, bytes]], children: dict[str, set[str]]) -> dict[str, int]:
    """The depths of all nodes that hang from a root, by what they name as their parents: so each is reached once."""
    depths = dict.fromkeys(children.get("root", ()), 0)
    waiting = list(depths)
    while waiting:
        head = waiting.pop()
        run = nodes[head][b"r"]
        for child in children.get(run[-16:].hex(), ()):
            depths[child] = depths[head] + len(run) // 16
            waiting.append(child)
    return depths


def _check_meta(meta: dict[bytes, bytes], report: Report) -> None:
    """Compare the counts of the shard with what there is."""
    for name in ("nodes", "chunks", "bytes", "warm", "cold"):
        told = meta.get(name.encode(), b"0")
        true: int = getattr(report, name)
        if count_of(told, -1) != true:
            text = told.decode() if count_of(told, -1) >= 0 else repr(told[:40])
            report.problems.append(f"meta counts {text} {name}, there are {true}")


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
    leaves = _members(client, keys.leaves)
    hot = _members(client, keys.hot)
    problems += [f"hot names {head}, which is no node" for head in sorted(hot) if head not in nodes]
    expected = {head for last, head in owners.items() if last not in children}
    report.missing = {head: count_of(nodes[head].get(b"a")) for head in expected - leaves}
    report.strays = [*sorted(leaves - expected), *sorted(hot - nodes.keys())]
    for last, junction in junctions.items():
        gone = _children(junction) - children.get(last, set())
        if gone or last not in children:
            report.childless[last] = sorted(gone)
    problems += [f"leaf {head} is not in leaves" for head in sorted(expected - leaves)]
    problems += [f"leaves names {head}, which is no leaf" for head in sorted(leaves - expected)]


def _members(client: redis.Redis, name: str) -> set[str]:
    """The members of a sorted set; none of a key that is no such set."""
    try:
        members = cast("list[bytes]", client.execute_command("ZRANGE", name, 0, -1))
    except redis.ResponseError:
        return set()
    return {as_text(member) for member in members}


def _children(junction: dict[bytes, bytes]) -> set[str]:
    """The heads that a junction names; its other fields are the owner, and holders, which all contain "@"."""
    return {as_text(name) for name in junction if name != b"o" and b"@" not in name}


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
                name = holder.decode(errors="surrogateescape")
                report.miscounted.append((last, name, true))
                report.problems.append(f"junction {last} counts {told!r} children that {name} covers, there are {true}")


def _weigh(node: dict[bytes, bytes]) -> int:
    """What `lua/shared/account.lua` estimates for a node."""
    holders = sum(name.startswith(b"h:") for name in node)
    extra = sum(len(value) for name, value in node.items() if name == b"m" or name[:2] in (b"b:", b"e:"))
    return 700 + len(node.get(b"r", b"")) // 16 * 16 + 70 * holders + extra + _payloads(node, b"b:@warm")


def _payloads(node: dict[bytes, bytes], column: bytes) -> int:
    """Bytes of a node's payloads in a tier, as the script that found them there counted them."""
    return sum(payload_sizes(node.get(column, b"")))


def _check_closed(
    keys: Keys,
    head: str,
    node: dict[bytes, bytes],
    above: dict[bytes, bytes],
    newest: dict[bytes, bytes],
    report: Report,
) -> None:
    """Who covers a node covers all of its parent; coverage under an older epoch counts for nothing, here as well."""
    for name, value in node.items():
        epoch, end = value.partition(b":")[0], len(above[b"r"]) // 16
        counts = name.startswith(b"h:") and newest.get(name[2:].partition(b"@")[0], epoch) == epoch
        whole = b"%s:%d" % (epoch, end)
        if name == b"h:@cold" and whole in (above.get(b"h:@warm"), above.get(name)):
            continue  # what is cold has warm or cold ones above it
        if counts and above.get(name) != whole:
            report.problems.append(f"node {head}: {as_text(name)} does not cover the parent")
            if name[2:] in (b"@warm", b"@cold"):
                report.orphans.append(head)  # its payloads go with it
            else:
                fields = tuple(kind + name[2:] for kind in (b"h:", b"b:", b"e:"))
                report.fixes.append(Fix("HDEL", as_bytes(keys.node(head)), fields))


def _check_links(
    keys: Keys,
    nodes: dict[str, dict[bytes, bytes]],
    junctions: dict[str, dict[bytes, bytes]],
    children: dict[str, set[str]],
    owners: dict[str, str],
    depths: dict[str, int],
    report: Report,
) -> None:
    problems = report.problems
    for last, heads in children.items():
        junction = junctions.get(last, {})
        named = _children(junction)
        key = as_bytes(keys.junction("" if last == "root" else last))
        for head in sorted(heads - depths.keys()):
            problems.append(f"node {head} has no parent" if last not in owners else f"node {head} lies below itself")
        if named != heads:
            problems.append(f"junction {last} names {sorted(named)}, its children are {sorted(heads)}")
        report.fixes += [Fix("HSET", key, (as_bytes(head), b"")) for head in sorted((heads & depths.keys()) - named)]
        owner = as_text(junction.get(b"o", b""))
        if last != "root" and owner != owners.get(last):
            problems.append(f"junction {last} is owned by {owner or 'nobody'}, not by {owners.get(last)}")
            if last in owners:
                report.fixes.append(Fix("HSET", key, (b"o", as_bytes(owners[last]))))
        for head in sorted(heads & depths.keys()):
            told = nodes[head].get(b"d", b"-1")
            if count_of(told, -1) != depths[head]:
                problems.append(f"node {head} lies at depth {told[:40]!r}, not {depths[head]}")
                report.fixes.append(Fix("HSET", as_bytes(keys.node(head)), (b"d", b"%d" % depths[head])))
    problems += [f"junction {last} has no children" for last in junctions if last not in children]


def _scan(client: redis.Redis, base: str) -> list[str]:
    pattern = base.replace("[", "\\[").replace("]", "\\]") + "*"
    return sorted({as_text(name) for name in client.scan_iter(match=pattern, count=1000)})

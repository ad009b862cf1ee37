"""An engine as its subscribers see it: publishes KV events over ZMQ, replays them, is killed and comes back."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Self

import msgpack
import zmq

END = b"\xff" * 8
Event = dict[str, Any]
Hash = int | bytes
_FIELDS = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")
_LATER = ("extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window")
_SGLANG = ("medium", "lora_name", "cache_salt")  # in its maps only when they are set


class Chain(NamedTuple):
    """A block by what it holds: all tokens from the prompt's beginning to its end, and what else they depend on."""

    tokens: tuple[int, ...]
    salt: str | None = None
    lora: str | None = None


class _Block(NamedTuple):
    chain: Chain
    parent: bytes | None


def block_hash(parent: bytes | None, tokens: Sequence[int], extras: Sequence[str] = ()) -> bytes:
    """An engine's name for a block: 32 bytes that depend on all before it."""
    content = msgpack.packb([parent or b"", list(tokens), list(extras)])
    return hashlib.sha256(content or b"").digest()


class FakeEngine:
    """Publishes on a free port, or connects to a subscriber that listens; replays from a free port.

    `format` is "map", "array-<n>" with n elements at most, "sglang-map" or "sglang-array". Everything but the replay
    happens in the calling thread, and is done when the call returns.
    """

    def __init__(
        self,
        *,
        connect: str | None = None,
        topic: str = "kv-events",
        parts: Literal[2, 3] = 3,
        buffer_steps: int = 10_000,
        replay: Literal["topic", "plain", "off"] = "topic",
        format: str = "map",  # noqa: A002 - what it is
        hashes: Literal["int", "signed", "bytes"] = "int",
        block_size: int = 4,
        rank: int | None = 0,
    ) -> None:
        self.endpoint = connect or "tcp://127.0.0.1:*"
        self.replay_endpoint: str | None = None if replay == "off" else "tcp://127.0.0.1:*"
        self.topic, self.format, self.hashes, self.block_size, self.rank = topic, format, hashes, block_size, rank
        self.seq = 0
        """Of the next message."""
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self.requests: list[int] = []
        """Where the replays that were asked for begin."""
        self._connects, self._parts, self._replays = connect is not None, parts, replay
        self.room: int | None = None
        """Parts of a replay that its queue takes, the end among them; the others are dropped, but for the last one."""
        self._swallowed = 0
        self._dropped = self._lost = self._subscribers = 0
        self._blocks: dict[str, dict[bytes, _Block]] = {}
        self._lock = threading.RLock()
        self._frozen = False
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Close the sockets; connecting is refused when this returns."""
        self._stopped.set()
        self._thread.join()
        if not self._context.closed:
            self._context.destroy(linger=0)
        self._subscribers = 0

    def restart(self, seq: int = 0) -> None:
        """A new process at the same ports, which holds nothing and counts from `seq`."""
        self.kill()
        self.seq, self._frozen = seq, False
        self._dropped = self._lost = 0
        self.buffer.clear()
        self._blocks.clear()
        self._open()

    def freeze(self) -> None:
        """Answer no replays any more. Connections stay, also for ZMQ, and calls of publish() still work."""
        self._frozen = True

    def thaw(self) -> None:
        """Answer again, also what was asked meanwhile."""
        self._frozen = False

    def wait_for_subscriber(self, count: int = 1, timeout_s: float = 10.0) -> None:
        """Return when so many topics are subscribed to: what is published from now on arrives."""
        until(lambda: self._subscribed() >= count, timeout_s)

    def publish(self, events: Iterable[Event]) -> int:
        """One message; its sequence number."""
        batch = [time.time(), [self._as_sent(event) for event in events], self.rank]
        return self.publish_raw(msgpack.packb(batch) or b"")

    def publish_raw(self, payload: bytes) -> int:
        """One message with any payload; its sequence number."""
        with self._lock:
            seq, self.seq = self.seq, self.seq + 1
            if self._lost:
                self._lost -= 1
                return seq
            self.buffer.append((seq, payload))
            if self._dropped:
                self._dropped -= 1
            else:
                self.send(*([self.topic.encode()] if self._parts == 3 else []), seq.to_bytes(8, "big"), payload)
            return seq

    def send(self, *parts: bytes) -> None:
        """A message of any parts, which takes no sequence number."""
        with self._lock:
            self._pub.send_multipart(parts)

    def drop_next(self, count: int) -> None:
        """Do not send so many of the next messages; they can be replayed."""
        self._dropped = count

    def swallow_next(self, count: int) -> None:
        """Do not send the end of so many of the next replays."""
        self._swallowed = count

    def lose_next(self, count: int) -> None:
        """Do not send so many of the next messages, nor keep them: only their numbers are used up."""
        self._lost = count

    def stored(
        self,
        tokens: Sequence[int],
        *,
        hashes: Sequence[Hash] | None = None,
        parent: Hash | None = None,
        block_size: int | None = None,
        medium: str | None = "GPU",
        lora_name: str | None = None,
        salt: str | None = None,
        group: int | None = 0,
        kind: str | None = "full_attention",
    ) -> Event:
        """BlockStored. Without `hashes`, each is computed from the one before, the first from `parent`."""
        size = block_size or self.block_size
        blocks = [tokens[at : at + size] for at in range(0, len(tokens) - size + 1, size)]
        salts = [salt if parent is None and not i else None for i in range(len(blocks))]
        extras = [[extra for extra in (lora_name, each) if extra is not None] for each in salts]
        if hashes is None:
            above = parent.to_bytes(32, "big", signed=True) if isinstance(parent, int) else parent or b""
            steps = zip(blocks, extras, strict=True)
            hashes = list(accumulate(steps, lambda last, step: block_hash(last, *step), initial=above))[1:]
        event: Event = {"type": "BlockStored", "block_hashes": list(hashes), "parent_block_hash": parent}
        event |= {"token_ids": list(tokens), "block_size": size, "lora_id": None, "medium": medium}
        event |= {"lora_name": lora_name, "extra_keys": [extra or None for extra in extras], "group_idx": group}
        return event | {"kv_cache_spec_kind": kind, "cache_salt": salt}

    def removed(self, hashes: Iterable[Hash], *, medium: str | None = "GPU", group: int | None = 0) -> Event:
        """BlockRemoved."""
        return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium, "group_idx": group}

    def cleared(self) -> Event:
        """AllBlocksCleared."""
        return {"type": "AllBlocksCleared"}

    def wire(self, digest: Hash) -> Hash:
        """A hash as it is sent: whole, or its low 64 bits with or without a sign. Numbers are sent as they are."""
        if isinstance(digest, int) or self.hashes == "bytes":
            return digest
        return int.from_bytes(digest[-8:], "big", signed=self.hashes == "signed")

    def prefill(
        self, tokens: Sequence[int], salt: str | None = None, lora: str | None = None, *, medium: str = "GPU"
    ) -> list[Hash]:
        """Hold the whole blocks of a prompt, and tell of those that are new; the hashes of all, as they are sent."""
        held, size = self._blocks.setdefault(medium, {}), self.block_size
        event = self.stored(tokens[: len(tokens) // size * size], lora_name=lora, salt=salt, medium=medium)
        digests: list[bytes] = event["block_hashes"]
        known = sum(digest in held for digest in digests)  # the first ones: evict() takes none that another hangs on
        for i, digest in enumerate(digests):  # known ones come last again: evict() begins with the longest unused
            new = _Block(Chain(tuple(tokens[: (i + 1) * size]), salt, lora), digests[i - 1] if i else None)
            held[digest] = held.pop(digest, new)
        if known < len(digests):
            event |= {"block_hashes": digests[known:], "token_ids": event["token_ids"][known * size :]}
            event |= {"extra_keys": event["extra_keys"][known:], "parent_block_hash": ([None, *digests])[known]}
            self.publish([event])
        return [self.wire(digest) for digest in digests]

    def evict(self, count: int, *, medium: str = "GPU") -> list[Hash]:
        """Drop so many blocks in one message, always one that none hangs on, longest unused first; their hashes."""
        held = self._blocks.setdefault(medium, {})
        gone: list[bytes] = []
        for _ in range(min(count, len(held))):
            parents = {block.parent for block in held.values()}
            gone.append(next(digest for digest in held if digest not in parents))
            del held[gone[-1]]
        if gone:
            self.publish(self.removed([digest], medium=medium) for digest in gone)
        return [self.wire(digest) for digest in gone]

    def clear(self) -> None:
        """Drop everything."""
        self._blocks.clear()
        self.publish([self.cleared()])

    @property
    def held(self) -> dict[str, set[Chain]]:
        """The truth: what prefill() and evict() left, by medium."""
        return {medium: {block.chain for block in held.values()} for medium, held in self._blocks.items() if held}

    def _as_sent(self, event: Event) -> Event | list[Any]:
        event = dict(event)
        if "block_hashes" in event:
            event["block_hashes"] = [self.wire(each) for each in event["block_hashes"]]
        if event.get("parent_block_hash") is not None:
            event["parent_block_hash"] = self.wire(event["parent_block_hash"])
        sglang = self.format.startswith("sglang")
        if self.format.endswith("map"):
            foreign, optional = (_LATER, _SGLANG) if sglang else ((_SGLANG[-1],), _LATER)
            never = {name for name in event if name in foreign or (name in optional and event[name] is None)}
            return {name: value for name, value in event.items() if name not in never}
        longest = 7 if sglang else int(self.format.removeprefix("array-"))
        return [event["type"], *(event[name] for name in (*_FIELDS, *_LATER)[: longest - 1] if name in event)]

    def _open(self) -> None:
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.XPUB)  # a PUB that tells of its subscribers
        self._pub.setsockopt(zmq.XPUB_VERBOSER, 1)
        self._pub.setsockopt(zmq.SNDHWM, 100_000)
        self._pub.setsockopt(zmq.RECONNECT_IVL, 50)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.sndhwm = 0  # or it drops what a busy reader has not taken
        try:
            if self._connects:
                self._pub.connect(self.endpoint)
            else:
                self.endpoint = _bind(self._pub, self.endpoint)
            if self.replay_endpoint is not None:
                self.replay_endpoint = _bind(self._router, self.replay_endpoint)
        except BaseException:
            self._context.destroy(linger=0)  # as where another process has one of the ports
            raise
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="fake-engine", daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while not self._stopped.wait(0.002):
            with self._lock, contextlib.suppress(zmq.Again):
                while not self._frozen:
                    self._replay(self._router.recv_multipart(zmq.NOBLOCK))

    def _replay(self, request: list[bytes]) -> None:
        if len(request) != 3:
            return
        start = int.from_bytes(request[2], "big")
        self.requests.append(start)
        head = [request[0], b"", *([self.topic.encode()] if self._replays == "topic" else [])]
        replies = [(seq.to_bytes(8, "big"), payload) for seq, payload in self.buffer if seq >= start]
        if self.room is not None and len(replies) > self.room:
            replies = [*replies[: self.room - 1], replies[-1]]
        if self._swallowed:
            self._swallowed -= 1
        else:
            replies.append((END, b""))
        for number, payload in replies:
            self._router.send_multipart([*head, number, payload])

    def _subscribed(self) -> int:
        with self._lock, contextlib.suppress(zmq.Again):
            while True:
                self._subscribers += 1 if self._pub.recv(zmq.NOBLOCK)[:1] == b"\1" else -1
        return self._subscribers


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for it; an AssertionError when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    def bound() -> bool:
        with contextlib.suppress(zmq.ZMQError):  # the port of the engine before may not be free yet
            socket.bind(endpoint)
            return True
        return False

    until(bound)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)

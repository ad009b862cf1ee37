"""This process's tie to a namespace: clients with deadlines, attachment, epochs, and what is done when Redis fails."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import redis

from distprefix.config import PrefixCacheConfig
from distprefix.errors import DistPrefixError, NotAttachedError, ScriptError, StaleEpochError, UnavailableError
from distprefix.hashing import ChunkHasher
from distprefix.history import History, Loss
from distprefix.operations import SCHEMA, Call
from distprefix.redis.address import embedded_name
from distprefix.redis.breaker import Breakers, new_breakers
from distprefix.redis.client import Client, run
from distprefix.redis.connections import connect
from distprefix.redis.embedded import EmbeddedServer
from distprefix.redis.endpoint import Endpoint
from distprefix.redis.keys import Keys
from distprefix.redis.namespace import attach
from distprefix.redis.proof import prove_servers
from distprefix.redis.roster import WorkerInfo, heartbeat, read_roster, register, retire
from distprefix.roster import Roster
from distprefix.turns import Turn

__all__ = ["Link"]

T = TypeVar("T")
_log = logging.getLogger("distprefix")
_ADMIN_TIMEOUT_S = 5.0
_LEASES_READ_S = 1.0
"""How old what is known of the ends of leases may become: they last three seconds at least."""


class Link:
    """Runs operations with the deadline that their kind has. Thread-safe."""

    def __init__(self, config: PrefixCacheConfig, client: redis.Redis | None = None) -> None:
        self._config = config
        self._holder = config.holder
        self.keys = Keys(config.namespace)
        self.failures: Counter[str] = Counter()
        """Failed calls by reason."""
        self.attached = False
        """Whether the epoch counts; if not, a new one has to be taken before anything is published."""
        self.history = History()
        """This worker's epoch, and what the shard acknowledged under it."""
        self.losses: Counter[str] = Counter()
        """How often the server had lost some of that, by how it showed."""
        self.on_loss: Callable[[], object] = lambda: None
        """Called once for each loss."""
        self.hasher: ChunkHasher
        """What names this namespace's chunks."""
        self._secret = b""
        self.rekeyed = 0
        """How often the namespace was made anew with another secret: its chunks have other names since."""
        self.on_rekey: Callable[[], object] = lambda: None
        """Called each time, when `hasher` is the new one."""
        self.renewed = 0
        """How often a new epoch was taken under which what this worker holds has to be published again."""
        self._warned_of_stale_epoch = False
        self._attaching = Turn()
        self.roster = Roster()
        self.lease_s = config.worker_lease_s
        self.info = WorkerInfo(media=(config.medium,))
        """What this worker says of itself while it holds a lease."""
        self._server: EmbeddedServer | None = None
        url = config.url or ""
        name = embedded_name(url) if url else ""
        if client is None and name is not None:
            self._server = EmbeddedServer(name)
            url = self._server.url
        self.url = url
        self.endpoint = Endpoint("url")
        self.breakers: Breakers = new_breakers(config.breaker_failures, config.breaker_reset_s)
        """Of the tree: walks and writes."""
        self._role_is_given = client is None

        def new_client(timeout_s: float, breakers: Breakers | None) -> Client:
            return Client(client or connect(url, timeout_s, self.endpoint), breakers, self.failures, self.endpoint)

        self.lookups = new_client(config.lookup_timeout_s, self.breakers)
        self.publishes = new_client(config.publish_timeout_s, self.breakers)
        self.admin = new_client(_ADMIN_TIMEOUT_S, None)
        try:
            prove_servers(config, _ADMIN_TIMEOUT_S, with_url=client is None and self._server is None)
            self._attach(self.admin, time.monotonic() + _ADMIN_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def _warn_of_hash(self) -> None:
        if self._config.hash_algorithm == "xxh3_128":
            _log.warning(
                "hash_algorithm xxh3_128 is no cryptographic hash: who chooses prompts can forge chunks of others in "
                "minutes. Keep it for namespaces all of whose tenants are trusted; blake2b is the default"
            )

    def _attach(self, client: Client, deadline: float) -> None:
        attached = attach(client, self.keys, self._config, deadline, self._secret)
        self.cold_is_elsewhere = attached.cold_is_elsewhere
        self._name_by(attached.hasher, attached.secret)
        member, asked = self._config.member, time.monotonic()
        self.attached = False  # interrupted from here on, this process may not know the epoch that Redis gave it
        epoch = register(client, self.keys, member, self.epoch, self.lease_s, self.info, deadline)
        self.history = History(attached.generation, epoch, b"%s %d %s" % (SCHEMA, epoch, member.encode()))
        self.roster.update(read_roster(client, self.keys, "", deadline), asked)
        self.attached = True

    def _name_by(self, hasher: ChunkHasher, secret: bytes) -> None:
        """Take over what names chunks."""
        before = getattr(self, "hasher", None)
        self._secret = secret
        if before is not None and before.check == hasher.check:
            return
        self.hasher = hasher
        if before is None:
            self._warn_of_hash()
            return
        self.rekeyed += 1
        _log.warning(
            "namespace %s was made anew by another process, with another secret: what this one knows under the old "
            "names is forgotten",
            self._config.namespace,
        )
        self.on_rekey()

    @property
    def epoch(self) -> int:
        """What this worker publishes under; 0 before it is attached."""
        return self.history.epoch

    def attach_again(self, seen_epoch: int, deadline: float, *, begins_anew: bool = False) -> None:
        """Make or check the namespace and take a new epoch, as after a flush; once for all who saw `seen_epoch`.

        What this worker holds is published again, unless it `begins_anew`. Five calls. Raises NamespaceError or
        UnavailableError.
        """
        me = object()
        try:
            if not self._attaching.take(me, deadline):
                raise UnavailableError("another thread is still attaching")
            if self.epoch == seen_epoch:
                self._attach(self.publishes, deadline)
                self.renewed += not begins_anew
                _log.info("attached to namespace %s again, under epoch %d", self._config.namespace, self.epoch)
        finally:
            if self._attaching.holder is me:
                self._attaching.holder = None

    def look_up(self, operation: Generator[Call, Any, T], deadline: float) -> tuple[T | None, int]:
        """Run a look-up. Returns None when Redis failed, and the calls made."""
        sent: list[str] = []
        history = self.history
        try:
            return run(operation, self.lookups, self.keys.meta, deadline, sent, self), len(sent)
        except NotAttachedError:
            self._lose(history, Loss.GONE)
            raise
        except DistPrefixError:
            if self._config.strict:
                raise
            return None, len(sent)

    def detach(self) -> None:
        """Take a new epoch before anything else is published: all that was published so far counts for nothing."""
        self.attached = False

    def settled_epoch(self) -> int:
        """The epoch that counts, once no other thread is attaching."""
        self._attaching.wait()
        return self.epoch

    def publish_deadline(self) -> float:
        """When a publish that begins now has to be done with everything (time.monotonic)."""
        return time.monotonic() + self._config.publish_timeout_s

    def publish(self, operation: Generator[Call, Any, T], deadline: float | None = None) -> T:
        """Run a change, by the deadline of a publish that begins now unless one is given.

        Raises UnavailableError or what the script refused.
        """
        history = self.history
        try:
            return run(operation, self.publishes, self.keys.meta, deadline or self.publish_deadline(), None, self)
        except NotAttachedError:
            self._lose(history, Loss.GONE)
            raise
        except StaleEpochError as error:
            if not self._warned_of_stale_epoch:
                self._warned_of_stale_epoch = True
                _log.warning("nothing of %s is published any more: %s", self._config.holder, error)
            raise

    def administer(self, operation: Generator[Call, Any, T], timeout_s: float = 60.0) -> T:
        """Run something that nobody waits for on a request."""
        history = self.history
        try:
            return run(operation, self.admin, self.keys.meta, time.monotonic() + timeout_s, None, self)
        except NotAttachedError:
            self._lose(history, Loss.GONE)
            raise

    def before_call(self) -> tuple[bytes, tuple[History, int]]:
        """The first argument of a call that is sent now, and what to compare its reply with."""
        history = self.history
        return history.header, (history, history.acked)

    def after_call(self, before: tuple[History, int], generation: bytes, had: int, has: int) -> None:
        """Look whether a reply shows that the server lost what it had acknowledged: then a new epoch is needed."""
        history, acked = before
        loss = history.check(acked, generation, had, has)
        if loss is not None:
            self._lose(history, loss)

    def _lose(self, history: History, loss: Loss) -> None:
        """All that was published under this epoch counts for nothing. Said once, unless a newer one counts already."""
        if history is not self.history or not history.lose():
            return
        self.attached = False
        self.losses[loss] += 1
        _log.warning(
            "Redis has lost what it acknowledged to %s in namespace %s, by a restart, a failover, a flush or a "
            "restored backup (%s): this worker takes a new epoch and publishes again what it holds",
            self._holder,
            self._config.namespace,
            loss,
        )
        self.on_loss()

    def refresh(self) -> None:
        """Learn who counts. One call, more when this worker has to attach anew, or over 500 changed. Never raises."""
        deadline, history, asked = self.publish_deadline(), self.history, time.monotonic()
        member = self._config.member
        outdated = self.roster.has_leases and asked - self.roster.read_at >= _LEASES_READ_S
        try:
            if self.attached:
                version = self.roster.version
                with_leases = outdated or not version
                reading = read_roster(
                    self.publishes, self.keys, version, deadline, with_leases=with_leases, member=member
                )
                self.roster.update(reading, asked)
                if reading.own_epoch < history.epoch:
                    self._lose(history, Loss.EPOCH)
                elif reading.own_epoch > history.epoch and self._is_void(reading.own_epoch, deadline):
                    self.attached = False
            if not self.attached:
                self.attach_again(history.epoch, deadline)
        except DistPrefixError as error:
            _log.debug("could not refresh: %s", error)

    def check_role(self) -> None:
        """End all connections where the server has become a replica: they would go on reading what it had.

        One call. Never raises.
        """
        if not self._role_is_given:
            return
        generation = self.endpoint.generation
        try:
            role: Any = self.publishes.command("ROLE", deadline=self.publish_deadline())
        except ScriptError:  # not permitted, or renamed: new connections and refused writes show it as well
            self._role_is_given = False
            return
        except DistPrefixError:
            return
        if role and role[0] == b"slave":
            self.endpoint.renew("replica", generation)

    def _is_void(self, current: int, deadline: float) -> bool:
        """Whether this worker was given up, rather than replaced by a newer process. One call."""
        voided = self.publishes.command("HGET", self.keys.voided, self._config.member, deadline=deadline)
        return voided == str(current).encode()

    def heartbeat(self) -> None:
        """This worker's lease lasts on. One call. Never raises."""
        try:
            member, deadline = self._config.member, self.publish_deadline()
            heartbeat(self.publishes, self.keys, member, self.epoch, self.lease_s, self.info, deadline)
        except DistPrefixError as error:
            _log.debug("no heartbeat: %s", error)

    def end_lease(self) -> None:
        """This worker is gone: what it published counts no more. One call. Never raises."""
        try:
            retire(self.publishes, self.keys, {self._config.member: self.epoch}, self.publish_deadline())
        except DistPrefixError as error:
            _log.debug("the lease ends by itself: %s", error)

    def is_live(self, holder: str, epoch: int) -> bool:
        """Whether coverage under this epoch counts: a shared tier's always, a worker's as the roster says."""
        if holder == self._holder:
            return epoch == self.epoch and not self.history.is_lost
        return self.roster.is_live(holder, epoch, time.monotonic())

    def close(self) -> None:
        """Close connections and leave the private server."""
        for client in (self.lookups, self.publishes, self.admin):
            client.close()
        if self._server is not None:
            self._server.close()

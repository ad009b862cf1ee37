"""This process's tie to a namespace: clients with deadlines, attachment, epochs, and what is done when Redis fails."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Generator
from typing import Any, TypeVar

import redis

from distprefix.config import PrefixCacheConfig
from distprefix.errors import DistPrefixError, NotAttachedError, ScriptError, StaleEpochError, UnavailableError
from distprefix.operations import Call
from distprefix.redis.address import embedded_name
from distprefix.redis.breaker import Breakers, new_breakers
from distprefix.redis.client import Client, connect, run
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
        self.epoch = 0
        self.attached = False
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

    def _attach(self, client: Client, deadline: float) -> None:
        self.history = attach(client, self.keys, self._config, deadline)
        """What the shard was when this process took its epoch."""
        self.cold_is_elsewhere = self.history.cold_is_elsewhere
        member, asked = self._config.member, time.monotonic()
        self.attached = False  # interrupted from here on, this process may not know the epoch that Redis gave it
        self.epoch = register(client, self.keys, member, self.epoch, self.lease_s, self.info, deadline)
        self.roster.update(read_roster(client, self.keys, "", deadline), asked)
        self.attached = True

    def attach_again(self, seen_epoch: int, deadline: float) -> None:
        """Make or check the namespace and take a new epoch, as after a flush; once for all who saw `seen_epoch`.

        Four calls. Raises NamespaceError or UnavailableError.
        """
        me = object()
        try:
            if not self._attaching.take(me, deadline):
                raise UnavailableError("another thread is still attaching")
            if self.epoch == seen_epoch:
                self._attach(self.publishes, deadline)
                _log.warning("attached to namespace %s again, under epoch %d", self._config.namespace, self.epoch)
        finally:
            if self._attaching.holder is me:
                self._attaching.holder = None

    def look_up(self, operation: Generator[Call, Any, T], deadline: float) -> tuple[T | None, int]:
        """Run a look-up. Returns None when Redis failed, and the calls made."""
        sent: list[str] = []
        epoch = self.epoch
        try:
            return run(operation, self.lookups, self.keys.meta, deadline, sent), len(sent)
        except NotAttachedError:
            if epoch == self.epoch:  # else another thread has attached anew meanwhile
                self.attached = False
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
        try:
            return run(operation, self.publishes, self.keys.meta, deadline or self.publish_deadline())
        except StaleEpochError as error:
            if not self._warned_of_stale_epoch:
                self._warned_of_stale_epoch = True
                _log.warning("nothing of %s is published any more: %s", self._config.holder, error)
            raise

    def administer(self, operation: Generator[Call, Any, T], timeout_s: float = 60.0) -> T:
        """Run something that nobody waits for on a request."""
        return run(operation, self.admin, self.keys.meta, time.monotonic() + timeout_s)

    def refresh(self) -> None:
        """Learn who counts. One call, more when this worker has to attach anew. Never raises."""
        deadline, seen_epoch, asked = self.publish_deadline(), self.epoch, time.monotonic()
        outdated = self.roster.has_leases and asked - self.roster.read_at >= _LEASES_READ_S
        try:
            if self.attached:
                version = "" if outdated else self.roster.version
                self.roster.update(read_roster(self.publishes, self.keys, version, deadline), asked)
            # Flushed, older data were restored, or made void.
            if not self.attached or self._is_void(self.roster.epoch(self._config.member), deadline):
                self.attach_again(seen_epoch, deadline)
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
        """Whether nobody has this worker's epoch: neither this process nor a newer one. A call if not this one."""
        if current <= self.epoch:
            return current < self.epoch
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
            return epoch == self.epoch
        return self.roster.is_live(holder, epoch, time.monotonic())

    def close(self) -> None:
        """Close connections and leave the private server."""
        for client in (self.lookups, self.publishes, self.admin):
            client.close()
        if self._server is not None:
            self._server.close()

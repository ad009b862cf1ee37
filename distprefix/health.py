"""What of a cache works now: each kind of call to each server by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distprefix.redis.breaker import BreakerState
from distprefix.redis.data import DataPool
from distprefix.redis.link import Link

__all__ = ["Health", "health_of"]


@dataclass(frozen=True, slots=True)
class Health:
    """The state of every breaker, and of the servers behind them, as this process knows them."""

    breakers: Mapping[str, BreakerState]
    """``walk`` and ``write`` for the tree; ``warm_read``, ``warm_write``, ``cold_read`` and ``cold_write`` for the
    servers of payloads. What is not closed is off: calls of this kind end at once until a probe goes well."""
    roles: Mapping[str, str]
    """``tree`` and ``cold``: master, slave, or empty before the first connection or where the server does not say."""
    attached: bool
    """Whether this worker's epoch counts; if not, the next publish takes a new one."""

    @property
    def off(self) -> tuple[str, ...]:
        """What is off now."""
        return tuple(name for name, state in self.breakers.items() if state is not BreakerState.CLOSED)

    @property
    def ok(self) -> bool:
        """Whether everything works."""
        return self.attached and not self.off

    def __bool__(self) -> bool:
        return self.ok


def health_of(link: Link, pools: Mapping[str, DataPool]) -> Health:
    """See `PrefixCacheOptimizer.health`."""
    breakers = {"walk": link.breakers.reads.state, "write": link.breakers.writes.state}
    roles = {"tree": link.endpoint.identity.role}
    for name, pool in pools.items():
        breakers[f"{name}_read"] = pool.breakers.reads.state
        breakers[f"{name}_write"] = pool.breakers.writes.state
        if pool.endpoint is not link.endpoint:
            roles[name] = pool.endpoint.identity.role
    return Health(breakers, roles, link.attached)

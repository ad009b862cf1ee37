"""Who has to give up how much when a whole server is over its budget. Pure: no Redis, no clock.

The budget is shared among tenants, and a tenant's share among its namespaces. What counts is the weight that the
operator gave, and how a namespace was used: it earns its weight within ten minutes of use, little in the first ones,
and loses half of it with each hour without. A tenant counts as its heaviest namespace does. So whoever makes new
namespaces, or new salts, gains no share by their number, and what is not used any more goes first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Standing", "to_free"]

_EARNED_MS = 600_000
_HALVED_MS = 3_600_000
_LEAST = 1e-6
_OWN_BYTES = 4096
"""What a namespace takes besides its tree: descriptor, secret, meta, the hashes of its workers."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A namespace as a server's budget sees it."""

    name: str
    tenant: str
    """What the namespaces of one salt have in common; empty without a salt."""
    bytes: int
    """The tree and the payloads that lie on this server, by the tree's own estimate."""
    created_ms: int
    used_ms: int
    share: float = 1.0
    """The weight that its operator gave."""

    def weight(self, now_ms: int) -> float:
        """What its part of the budget is in proportion to."""
        earned = min(1.0, max(0, self.used_ms - self.created_ms) / _EARNED_MS) ** 3
        kept = 0.5 ** (max(0, now_ms - self.used_ms) / _HALVED_MS)
        return max(_LEAST, self.share * earned * kept)

    @property
    def size(self) -> int:
        """Bytes with all that belongs to it."""
        return self.bytes + _OWN_BYTES


def to_free(standings: Sequence[Standing], budget: int, wanted: int, now_ms: int) -> list[tuple[Standing, int]]:
    """From which namespaces how many bytes go, so that `wanted` bytes go in all, as far as there are so many.

    First what namespaces have over their shares, from the one that is furthest over; of equals from the one used
    longest ago. A namespace of a tenant that is within its share is not over. What then is still wanted goes from all,
    in proportion to what they have.
    """
    over = _overdrafts(standings, budget, now_ms)
    left = {each.name: each.size for each in standings}
    taken: dict[str, int] = {}
    for each in sorted(standings, key=lambda each: (-over[each.name], each.used_ms, each.name)):
        amount = min(wanted, over[each.name])
        if amount > 0:
            taken[each.name] = amount
            left[each.name] -= amount
            wanted -= amount
    total = sum(left.values())
    for each in standings if wanted > 0 and total > 0 else ():
        amount = min(left[each.name], -(-left[each.name] * wanted // total))
        taken[each.name] = taken.get(each.name, 0) + amount
    return [(each, taken[each.name]) for each in standings if taken.get(each.name)]


def _overdrafts(standings: Sequence[Standing], budget: int, now_ms: int) -> dict[str, int]:
    """By how many bytes each namespace is over its share; 0 for those that are within it."""
    by_tenant: dict[str, list[Standing]] = defaultdict(list)
    for each in standings:
        by_tenant[each.tenant].append(each)
    weights = {tenant: max(each.weight(now_ms) for each in own) for tenant, own in by_tenant.items()}
    total = sum(weights.values())
    over: dict[str, int] = {}
    for tenant, own in by_tenant.items():
        share = budget * weights[tenant] / total
        own_total = sum(each.weight(now_ms) for each in own)
        tenant_over = max(0, int(sum(each.size for each in own) - share))
        for each in own:
            own_over = int(each.size - share * each.weight(now_ms) / own_total)
            over[each.name] = min(each.size, tenant_over, max(0, own_over))
    return over

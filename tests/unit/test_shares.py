"""Who gives up how much when the server is full: those over their share, and nobody by being outnumbered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distprefix.shares import Standing, to_free

NOW = 10_000_000_000
HOUR = 3_600_000
MIB = 1 << 20


def standing(
    name: str, size: int, *, tenant: str = "", age_h: float = 24, idle_h: float = 0, share: float = 1.0
) -> Standing:
    """A namespace of so many bytes, made and used so long ago."""
    return Standing(name, tenant, size, int(NOW - age_h * HOUR), int(NOW - idle_h * HOUR), share)


def amounts(plan: list[tuple[Standing, int]]) -> dict[str, int]:
    """By name."""
    return {each.name: amount for each, amount in plan}


def test_who_is_over_gives_first() -> None:
    """Two tenants with equal weights: only the one that has more than half gives."""
    plan = to_free([standing("a", 70 * MIB, tenant="x"), standing("b", 20 * MIB, tenant="y")], 80 * MIB, 10 * MIB, NOW)
    assert amounts(plan) == {"a": 10 * MIB}


def test_the_furthest_over_gives_first() -> None:
    """Of several that are over their shares the one with most over gives what it has over, then the next."""
    every = [standing(name, size * MIB, tenant=name) for name, size in (("a", 30), ("b", 50), ("c", 5))]
    plan = to_free(every, 60 * MIB, 31 * MIB, NOW)
    assert set(amounts(plan)) == {"a", "b"}
    assert amounts(plan)["b"] > 29 * MIB


def test_many_new_namespaces_gain_no_share() -> None:
    """A thousand namespaces made a moment ago, under as many salts, take nothing from one that is used for long."""
    honest = standing("honest", 8 * MIB, tenant="honest", age_h=5)
    crowd = [standing(f"n{i}", MIB // 5, tenant=f"salt {i}", age_h=0.01, idle_h=0.005) for i in range(1000)]
    plan = to_free([honest, *crowd], 40 * MIB, 20 * MIB, NOW)
    assert "honest" not in amounts(plan)
    assert sum(amounts(plan).values()) == 20 * MIB


def test_many_namespaces_of_one_tenant_gain_no_share() -> None:
    """A tenant with a hundred namespaces, all in use, has the share of one tenant."""
    many = [standing(f"m{i}", MIB, tenant="many") for i in range(100)]
    one = standing("one", 40 * MIB, tenant="one")
    plan = amounts(to_free([*many, one], 120 * MIB, 20 * MIB, NOW))
    assert "one" not in plan
    assert sum(plan.values()) == 20 * MIB


def test_what_is_not_used_goes_before_what_is() -> None:
    """Of two with the same size the one that nobody has used for hours gives."""
    idle = standing("idle", 30 * MIB, tenant="x", idle_h=6)
    plan = to_free([standing("busy", 30 * MIB, tenant="y"), idle], 50 * MIB, 10 * MIB, NOW)
    assert amounts(plan) == {"idle": 10 * MIB}


def test_shares_are_weights() -> None:
    """A namespace with three times the share keeps three times as much."""
    every = [standing("a", 50 * MIB, share=3), standing("b", 50 * MIB)]
    plan = amounts(to_free(every, 80 * MIB, 20 * MIB, NOW))
    assert plan == {"b": 20 * MIB}


def test_when_nobody_is_over_all_give() -> None:
    """What else is on the server may fill it: then everybody gives in proportion to what they have."""
    every = [standing("a", 10 * MIB, tenant="x"), standing("b", 20 * MIB, tenant="y")]
    plan = amounts(to_free(every, 100 * MIB, 6 * MIB, NOW))
    assert set(plan) == {"a", "b"}
    assert 1.9 < plan["b"] / plan["a"] < 2.1


@given(
    st.lists(
        st.tuples(
            st.integers(0, 50 * MIB), st.integers(0, 5), st.floats(0, 100), st.floats(0, 100), st.floats(0.001, 9)
        ),
        max_size=30,
    ),
    st.integers(1, 200 * MIB),
    st.integers(1, 300 * MIB),
)
def test_just_what_is_wanted_goes(every: list[tuple[int, int, float, float, float]], budget: int, wanted: int) -> None:
    """The plan frees what is wanted or all there is, never more than a namespace has, and each namespace once."""
    standings = [
        standing(f"n{i}", size, tenant=f"t{tenant}", age_h=age + idle, idle_h=idle, share=share)
        for i, (size, tenant, age, idle, share) in enumerate(every)
    ]
    plan = to_free(standings, budget, wanted, NOW)
    total = sum(each.size for each in standings)
    assert len({each.name for each, _ in plan}) == len(plan)
    assert all(0 < amount <= each.size for each, amount in plan)
    freed = sum(amount for _, amount in plan)
    assert min(wanted, total) <= freed <= min(wanted, total) + len(standings)

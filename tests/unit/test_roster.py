"""Who counts: epochs, leases by two clocks, members by their names."""

from __future__ import annotations

import math

import pytest

from distprefix.roster import Reading, Roster, member_of, members_of


def reading(epochs: dict[str, int] | None, ends: dict[str, int] | None = None, *, server_ms: int = 0) -> Reading:
    """What Redis says, at this time of the server's clock."""
    return Reading(server_ms, "7", epochs, ends or {})


def roster(epochs: dict[str, int], ends: dict[str, int] | None = None, *, server_ms: int = 0, at: float = 0) -> Roster:
    """One that was read at `at`."""
    made = Roster()
    made.update(reading(epochs, ends, server_ms=server_ms), at)
    return made


@pytest.mark.parametrize(
    ("holder", "member"),
    [("w1/0@gpu", "w1/0"), ("w1/12@cpu", "w1/12"), ("a.b_c-d/0@disk", "a.b_c-d/0"), ("@shared", ""), ("w1/0", "w1/0")],
)
def test_a_holder_belongs_to_a_rank(holder: str, member: str) -> None:
    """The medium is left out, and a shared tier belongs to nobody."""
    assert member_of(holder) == member


def test_the_ranks_of_a_worker() -> None:
    """A worker's ranks are its own, not those of one whose name begins alike or ends so, nor what has no rank."""
    members = ["w1/0", "w1/1", "w10/0", "w/1", "aw1/0", "w1", "w1/0/0", "", "/0"]
    assert members_of("w1", members) == ["w1/0", "w1/1"]
    assert members_of("absent", members) == []


@pytest.mark.parametrize(("epoch", "live"), [(1, False), (2, False), (3, True)])
def test_only_the_newest_epoch_counts(epoch: int, live: bool) -> None:
    """Coverage of an older process counts for nothing, whichever medium it lies in."""
    made = roster({"w1/0": 3})
    assert made.is_live("w1/0@gpu", epoch, 0) is live
    assert made.is_live("w1/0@cpu", epoch, 0) is live
    assert made.epoch("w1/0") == 3


def test_ranks_do_not_void_each_other() -> None:
    """Each rank has an epoch of its own."""
    made = roster({"w1/0": 1, "w1/1": 9})
    assert made.is_live("w1/0@gpu", 1, 0)
    assert not made.is_live("w1/1@gpu", 1, 0)


@pytest.mark.parametrize("server_ms", [0, 5_000, 1_900_000_000_000])
@pytest.mark.parametrize("at", [0.0, 12.5, 1e6])
def test_a_lease_ends_by_the_servers_clock(server_ms: int, at: float) -> None:
    """Whatever the two clocks say, a lease of two seconds lasts two seconds from when it was asked for."""
    made = roster({"w1/0": 1}, {"w1/0": server_ms + 2_000}, server_ms=server_ms, at=at)
    assert made.is_live("w1/0@gpu", 1, at)
    assert made.is_live("w1/0@gpu", 1, at + 1.999)
    assert not made.is_live("w1/0@gpu", 1, at + 2.001)
    assert made.is_live("w1/0@gpu", 1, at), "asking changes nothing"


def test_a_lease_that_had_ended_when_it_was_read() -> None:
    """Does not count for a moment."""
    made = roster({"w1/0": 1}, {"w1/0": 9_999}, server_ms=10_000, at=50.0)
    assert not made.is_live("w1/0@gpu", 1, 50.0)


def test_without_a_lease_a_member_counts_for_ever() -> None:
    """Who holds none counts until a newer epoch is known."""
    made = roster({"w1/0": 1, "w2/0": 1}, {"w2/0": 5})
    assert made.is_live("w1/0@gpu", 1, 1e12)
    assert made.has_leases
    assert not roster({"w1/0": 1}).has_leases


def test_an_unknown_member_counts() -> None:
    """It registered after the roster was read; once an epoch of it is seen, older ones count no more."""
    made = Roster()
    assert (made.version, made.epoch("w1/0")) == ("", 0)
    assert made.is_live("w1/0@gpu", 4, 0)
    assert made.epoch("w1/0") == 4
    assert not made.is_live("w1/0@gpu", 3, 0)


def test_a_newer_epoch_in_a_reply_is_believed() -> None:
    """It voids the older one, and the lease that is known is that of the older process."""
    made = roster({"w1/0": 1}, {"w1/0": 1_000})
    assert made.is_live("w1/0@gpu", 2, 5.0)
    assert not made.is_live("w1/0@gpu", 1, 0.5)
    made.update(reading({"w1/0": 2}, {"w1/0": 7_000}), 0.0)
    assert made.is_live("w1/0@gpu", 2, 6.0)
    assert not made.is_live("w1/0@gpu", 2, 8.0)


@pytest.mark.parametrize("epoch", [0, 1, 10**12])
def test_a_shared_tier_always_counts(epoch: int) -> None:
    """It belongs to no worker, so no epoch and no lease voids it, not even one of the empty name."""
    assert roster({"": 5, "w1/0": 1}, {"": 1}).is_live("@pool", epoch, 1e9)


def test_an_unchanged_reading_changes_nothing() -> None:
    """When Redis says that all is as it was, the ends of leases and when they were read stay as they are."""
    made = roster({"w1/0": 1}, {"w1/0": 1_000}, at=10.0)
    made.update(Reading(900_000, "8", None, {}), 99.0)
    assert (made.version, made.read_at, made.epoch("w1/0")) == ("7", 10.0, 1)
    assert made.is_live("w1/0@gpu", 1, 10.9)
    assert not made.is_live("w1/0@gpu", 1, 11.1)


def test_a_reading_replaces_the_one_before() -> None:
    """A lease that was renewed lasts on, one that is named no more is none, and a member that is gone is unknown."""
    made = roster({"w1/0": 1, "w2/0": 1, "w3/0": 8}, {"w1/0": 1_000, "w2/0": 1_000})
    made.update(reading({"w1/0": 1, "w2/0": 2}, {"w1/0": 9_000}, server_ms=5_000), 5.0)
    assert made.is_live("w1/0@gpu", 1, 8.9)
    assert not made.is_live("w2/0@gpu", 1, 0.0)
    assert made.is_live("w2/0@gpu", 2, 1e9)
    assert made.epoch("w3/0") == 0
    assert made.read_at == 5.0


def test_the_names_of_holders_are_remembered_right() -> None:
    """Asking of many holders by turns gives each its own answer."""
    made = roster({f"w{i}/{rank}": i + rank for i in range(1, 20) for rank in range(3)})
    for _ in range(2):
        for i in range(1, 20):
            for rank in range(3):
                assert made.is_live(f"w{i}/{rank}@gpu", i + rank, 0)
                assert not made.is_live(f"w{i}/{rank}@gpu", i + rank - 1, 0)


def test_before_the_first_reading() -> None:
    """All there is to say is that nothing was read."""
    made = Roster()
    assert (made.version, made.read_at, made.has_leases) == ("", -math.inf, False)

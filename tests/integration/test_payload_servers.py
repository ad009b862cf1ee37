"""The servers of the tiers are killed, and come back with all, some or none of their data: no byte is wrong."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.errors import DistPrefixError, UnavailableError
from distprefix.redis.integrity import check_payloads
from tests.contract.test_find import prompt
from tests.integration.test_payload_stress import NEVER, everything_ends_well
from tests.payloads import ALWAYS, data, demote, loaded, meta, metric, names
from tests.servers import Backend, Server, find_server

PROMPTS = [*(prompt(6, tail=tail) for tail in range(4)), [5] * 20, [6] * 20]
RIGHT = [data(tokens) for tokens in PROMPTS]
KILLS = 3
STRAYS = "stays and belongs to nothing"


class Place:
    """Two servers, or one, with a node that may be asked anything while they come and go."""

    def __init__(self, kept: str, *, elsewhere: bool) -> None:
        self.kept = kept
        options = ("--appendonly", "yes", "--appendfsync", "always") if kept == "all" else ()
        count = 2 if elsewhere else 1
        self.servers = [Server(find_server("valkey-9.1"), *options, tcp=True).start() for _ in range(count)]
        self.warm, self.cold = self.servers[0], self.servers[-1]
        self.backend = Backend("own", self.warm.client(), "t", url=self.warm.url)
        self.options: dict[str, Any] = {
            **{"strict": False, "breaker_failures": 10_000, "publish_timeout_s": 5.0, "payload_timeout_s": 5.0},
            **({"cold_url": self.cold.url} if elsewhere else {}),
        }
        self.other = self.cold.client() if elsewhere else None

    def lose(self, server: Server) -> None:
        """Kill a server, and take from it what it is to lose."""
        server.kill()
        if self.kept == "none":
            for name in server.folder.glob("*.rdb"):
                name.unlink()
            shutil.rmtree(server.folder / "appendonlydir", ignore_errors=True)

    def close(self) -> None:
        """Stop all of it."""
        for server in self.servers:
            if server._process is None:
                server.start()
        self.backend.close()
        for server in self.servers:
            server.stop()


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The servers that a test asks for: what they keep, and whether there are two."""
    kept, elsewhere = request.param
    made = Place(kept, elsewhere=elsewhere)
    yield made
    made.close()


def use(cache: PrefixCacheOptimizer, done: Counter[str], wrong: list[str], until: threading.Event) -> None:
    """Store, load and move until told to end; every byte is compared."""
    drawn = Random(1)
    while not until.is_set():
        which, action = drawn.randrange(len(PROMPTS)), drawn.choice(("store", "store", "load", "load", "move", "bring"))
        tokens, right = PROMPTS[which], RIGHT[which]
        try:
            if action == "store":
                done["stored"] += cache.store(tokens, right) == len(right)
            elif action == "load":
                found = loaded(cache, tokens)
                done["loaded"] += len(found)
                done["whole"] += len(found) == len(right)
                if found != right[: len(found)]:
                    wrong.append(f"other bytes in prompt {which}")
            elif action == "move":
                done["demoted"] += cache.demote(ALWAYS)
            else:
                done["promoted"] += cache.promote(tokens)
        except DistPrefixError as error:
            done["refused"] += 1
            if action in ("store", "load"):
                wrong.append(f"{action} raised {error!r}")
        except Exception as error:  # noqa: BLE001 - the thread tells the test
            wrong.append(repr(error))


def wait_for(done: Counter[str], name: str, more: int, user: threading.Thread) -> None:
    """Until the node in the background has done so much more."""
    before = done[name]
    while done[name] < before + more and user.is_alive():
        time.sleep(0.01)


def connect_again(cache: PrefixCacheOptimizer) -> None:
    """Let a node find out that what it had open leads to a server that is gone: nothing is sent twice."""
    for _ in range(5):
        cache.load(PROMPTS[0])
        with contextlib.suppress(DistPrefixError):
            cache.demote(NEVER)


@pytest.mark.parametrize(
    ("place", "which"),
    [
        *(((kept, False), "warm") for kept in ("all", "some", "none")),
        *(((kept, True), which) for kept in ("all", "some", "none") for which in ("warm", "cold")),
    ],
    indirect=["place"],
)
def test_a_server_is_killed_and_comes_back(place: Place, which: str) -> None:
    """Killed in the middle of everything, with its data, with older ones or without: no wrong byte, and all goes on."""
    cache, backend = place.backend.open(**place.options), place.backend
    server = place.warm if which == "warm" else place.cold
    done, wrong, until = Counter[str](), list[str](), threading.Event()
    user = threading.Thread(target=use, args=(cache, done, wrong, until))
    user.start()
    try:
        for _ in range(KILLS):
            wait_for(done, "whole", 10, user)
            if place.kept == "some":
                server.client().save()
                wait_for(done, "demoted", 10, user)
            place.lose(server)
            wait_for(done, "refused", 1, user)
            server.start()
    finally:
        wait_for(done, "whole", 10, user)
        until.set()
        user.join()
    assert wrong == []
    assert min(done[name] for name in ("stored", "whole", "demoted", "promoted")) > 0
    assert done["refused"] >= KILLS
    connect_again(cache)
    for tokens, right in zip(PROMPTS, RIGHT, strict=True):
        found = loaded(cache, tokens)
        assert found == right[: len(found)]
    for tokens, right in zip(PROMPTS, RIGHT, strict=True):
        assert cache.store(tokens, right) == len(right)
    assert [loaded(cache, tokens) for tokens in PROMPTS] == RIGHT
    demote(backend, cache)
    assert [loaded(cache, tokens) for tokens in PROMPTS] == RIGHT
    assert meta(backend, "warm") == 0 < meta(backend, "cold")
    if place.other is None or place.kept == "all" or (which, place.kept) == ("cold", "none"):
        everything_ends_well(backend, cache, place.other)
    else:  # one server knows of things that the other one forgot
        cache.demote(NEVER)
        assert cache.check_integrity().problems == []
        problems = check_payloads(backend.admin, backend.keys, place.other)
        assert [problem for problem in problems if not problem.endswith(STRAYS)] == []


@pytest.mark.parametrize("place", [("none", False)], indirect=True)
def test_moving_after_the_tree_is_lost(place: Place) -> None:
    """Promoting or demoting what an emptied server no longer has moves nothing, and all goes on."""
    cache = place.backend.open(**place.options)
    for move in (lambda: cache.promote(PROMPTS[4]), lambda: cache.demote(ALWAYS)):
        assert cache.store(PROMPTS[4], RIGHT[4]) == 5
        place.warm.client().flushall()
        assert move() == 0
    assert cache.store(PROMPTS[4], RIGHT[4]) == 5
    everything_ends_well(place.backend, cache)


@pytest.mark.parametrize("place", [("none", True)], indirect=True)
def test_a_tree_that_is_lost_leaves_nothing_on_the_other_server(place: Place) -> None:
    """What lay cold elsewhere when the tree was lost goes from there when it is reclaimed, and nothing else does."""
    cache = place.backend.open(**place.options)
    assert cache.store(PROMPTS[4], RIGHT[4]) == 5
    assert demote(place.backend, cache) == 5
    place.lose(place.warm)
    place.warm.start()
    connect_again(cache)
    assert loaded(cache, PROMPTS[4]) == []
    assert cache.store(PROMPTS[5], RIGHT[5]) == 5
    assert demote(place.backend, cache) == 5
    elsewhere: Any = cache._tiers._elsewhere
    assert elsewhere.reclaim(time.monotonic() + 10) == 5
    assert elsewhere.reclaim(time.monotonic() + 10) == 0
    everything_ends_well(place.backend, cache, place.other)
    assert loaded(cache, PROMPTS[5]) == RIGHT[5]


@pytest.mark.parametrize("place", [("all", True)], indirect=True)
def test_the_server_of_the_cold_tier_is_away(place: Place) -> None:
    """Meanwhile warm payloads come and go, demotion is refused and loses nothing; afterwards all is as before."""
    cache, backend = place.backend.open(**place.options), place.backend
    gone, stays, fresh = 4, 5, 0
    assert cache.store(PROMPTS[gone], RIGHT[gone]) == len(RIGHT[gone])
    assert demote(backend, cache) == len(RIGHT[gone])
    assert cache.store(PROMPTS[stays], RIGHT[stays]) == len(RIGHT[stays])
    place.lose(place.cold)
    for _ in range(3):
        assert loaded(cache, PROMPTS[gone]) == []
        assert loaded(cache, PROMPTS[stays]) == RIGHT[stays]
        assert cache.store(PROMPTS[fresh], RIGHT[fresh]) == len(RIGHT[fresh])
        assert loaded(cache, PROMPTS[fresh]) == RIGHT[fresh]
        with pytest.raises(UnavailableError):
            cache.demote(ALWAYS, timeout_s=1.0)
        for key in names(backend.admin, backend, "moving:"):  # or the next round would leave it to the first one
            backend.admin.delete(backend.keys.base + key)
        with pytest.raises(UnavailableError):
            cache.promote(PROMPTS[gone], timeout_s=1.0)
    assert metric(cache, "payloads_unavailable") == 3
    assert cache.check_integrity().problems == []
    place.cold.start()
    assert [loaded(cache, PROMPTS[at]) for at in (gone, stays, fresh)] == [RIGHT[at] for at in (gone, stays, fresh)]
    assert demote(backend, cache) == len(RIGHT[stays]) + len(RIGHT[fresh])
    assert [loaded(cache, PROMPTS[at]) for at in (gone, stays, fresh)] == [RIGHT[at] for at in (gone, stays, fresh)]
    assert cache.promote(PROMPTS[gone]) == len(RIGHT[gone])
    everything_ends_well(backend, cache, place.other)

"""`distprefix restored` as an operator runs it after bringing back a backup."""

from __future__ import annotations

import json

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.redis.keys import Keys
from tests.commands import run_cli
from tests.contract.test_find import prompt
from tests.faults import wait_until
from tests.servers import Backend, Server
from tests.workers import held

TEN = prompt(10)


def test_the_living_publish_again_and_the_dead_count_no_more(real_server: Backend) -> None:
    """Workers that run hold what they hold under a new epoch; what a process left that runs no more is void."""
    dead = real_server.open("dead")
    dead.cache_prefix([7] * 8)
    dead.close()
    worker = real_server.open("w1", feed_interval_s=0.02, touch_interval_s=0.05)
    reader = real_server.open("r", feed_interval_s=0.02, touch_interval_s=0.05)
    worker.cache_prefix(TEN, range(10))
    assert held(reader, [7] * 8) == {"dead/0@gpu": 2}
    epoch = worker.get_metrics()["epoch"]
    where = ("--url", real_server.url or "", "--namespace", real_server.namespace)
    done = run_cli("restored", *where, "--json")
    assert json.loads(done.stdout) == {real_server.namespace: 3}
    wait_until(lambda: worker.get_metrics()["epoch"] > epoch)
    wait_until(lambda: held(reader, TEN) == {"w1/0@gpu": 10})
    wait_until(lambda: held(reader, [7] * 8) == {})
    assert worker.get_metrics()["history_lost"] == {"generation": 1}


def test_every_namespace(own_server: Server) -> None:
    """With --all it is said of each namespace, also where one of them is of another version, which is named."""
    for name in ("one", "two", "old"):
        PrefixCacheOptimizer(PrefixCacheConfig(url=own_server.url, namespace=name, worker_id="w")).close()
    done = run_cli("restored", "--url", own_server.url, "--all", "--json")
    assert json.loads(done.stdout) == {"one": 1, "two": 1, "old": 1}
    with own_server.client() as admin:
        admin.hset(Keys("old").meta, "schema", "3")
    done = run_cli("restored", "--url", own_server.url, "--all")
    assert "one: 1 ranks publish again what they hold" in done.stdout
    assert done.returncode == 1
    assert "nothing was said of 'old': DPSCHEMA" in done.stderr


def test_no_such_namespace(real_server: Backend) -> None:
    """A name that is not there is an error that names it, with the exit code of what was not found."""
    done = run_cli("restored", "--url", real_server.url or "", "--namespace", "nowhere")
    assert done.returncode == 1
    assert "there is no namespace 'nowhere'" in done.stderr

"""`distprefix audit`: find forged data in a namespace."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Annotated, Any

import redis
import typer

from distprefix.cli.common import (
    EXIT_MISS,
    EXIT_USAGE,
    ColdUrl,
    Json,
    Namespace,
    Url,
    describe,
    errors,
    opened,
)
from distprefix.cli.output import fail, note, show
from distprefix.config import PrefixCacheConfig, settings_of_environment
from distprefix.optimizer import PrefixCacheOptimizer
from distprefix.redis.audit import Audit, Scope, audit_namespace
from distprefix.redis.connections import connect
from distprefix.redis.keys import Keys
from distprefix.tiers.payloads import COLD, WARM

__all__ = ["audit"]

_DEADLINE_S = 600.0
_TIMEOUT_S = 5.0
_MAX_LINES = 100


def audit(
    url: Url = None,
    namespace: Namespace = "default",
    sample: Annotated[int, typer.Option(min=0, help="Payloads to read and verify.")] = 200,
    leases: Annotated[
        bool, typer.Option("--leases", help="Every worker is to hold a lease: report coverage of those that do not.")
    ] = False,
    cold_url: ColdUrl = None,
    as_json: Json = False,
) -> None:
    """Check a namespace for what a compromised worker may have left in it; exit code 1 when something is wrong.

    Keys of encrypted payloads are read from DISTPREFIX_ENCRYPTION_KEYS. Nothing of the tree is changed.
    """
    with errors(), opened(url) as (client, where):
        found = describe(client, namespace, private=url is None)
        config = _config(where, namespace, found, cold_url)
        keys = Keys(namespace)
        with PrefixCacheOptimizer(config) as cache:
            if cache._tiers.payloads.cold is None:  # noqa: SLF001
                fail("the namespace keeps cold payloads on another server: pass --cold-url", EXIT_USAGE)
            done = _run(cache, client, keys, sample, must_lease=leases)
            cache.drop_worker(config.worker_id)
        value: dict[str, Any] = asdict(done)
        show(value, as_json=as_json, render=_lines)
        if not done.was_still and not as_json:
            note("workers kept writing, so the tree's structure was not judged; try again")
        if done.findings:
            raise typer.Exit(EXIT_MISS)


def _run(cache: PrefixCacheOptimizer, client: redis.Redis, keys: Keys, sample: int, *, must_lease: bool) -> Audit:
    config = cache.config
    payloads = cache._tiers.payloads  # noqa: SLF001 - they are opened as workers open them
    stores = {WARM: payloads.warm}
    if payloads.cold is not None:
        stores[COLD] = payloads.cold
    cold = connect(config.cold_url, _TIMEOUT_S) if config.cold_url else None
    scope = Scope(stores, cold, config.max_run, sample, bool(config.encryption_keys), must_lease)
    try:
        return audit_namespace(client, keys, scope, time.monotonic() + _DEADLINE_S)
    finally:
        if cold is not None:
            cold.close()


def _config(url: str, namespace: str, found: dict[str, str], cold_url: str | None) -> PrefixCacheConfig:
    """Settings that the namespace was made with, the rest from the environment."""
    settings: dict[str, Any] = {"url": url, "worker_id": f"audit-{os.getpid()}", "worker_lease_s": 0.0}
    settings |= {
        "feed_interval_s": 0.0,
        "touch_interval_s": 0.0,
        "maintain_interval_s": 0.0,
        "demote_interval_s": 0.0,
        "prewarm_on_start": False,
    }
    if cold_url:
        settings["cold_url"] = cold_url
    return PrefixCacheConfig.from_descriptor(namespace, found, settings_of_environment(), **settings)


def _lines(value: dict[str, Any]) -> str:
    lines = [f"{value['nodes']:,} nodes, {value['payloads']:,} payloads read: {value['verified']:,} verified"]
    if value["unreadable"]:
        lines.append(f"{value['unreadable']:,} payloads cannot be opened here: pass DISTPREFIX_ENCRYPTION_KEYS")
    findings = value["findings"]
    lines += [f"{finding['doubt']}: {finding['what']}" for finding in findings[:_MAX_LINES]]
    more = len(findings) - _MAX_LINES
    if more > 0:
        lines.append(f"and {more:,} more, see --json")
    return "\n".join(lines if findings else [*lines, "nothing is wrong"])

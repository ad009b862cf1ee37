"""What deploy/ and docker-compose.yml set up: loads on every kind of server, opens nothing, publishes no password."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.engines.vllm_plugin import CONNECTOR
from distprefix.redis.provision import read_passwords
from distprefix.redis.rights import Role, commands_of
from tests.commands import run_cli
from tests.servers import absent, deployed, find_server, serving, users_acl

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
PRODUCTION = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
# What the Python side of a worker sends, next to what the scripts call.
CLIENT = {
    *("evalsha", "evalsha_ro", "expire", "hgetall", "hincrby", "info", "ping", "role", "srandmember", "type", "zcard"),
    "zrange",
}
SERVERS = ("redis-7.0", "redis-8.2", "valkey-9.1")
TRUNK = list(range(400))


@pytest.fixture(scope="module", params=SERVERS)
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Run a server in a copy of deploy/, with users for one namespace."""
    folder = tmp_path_factory.mktemp("deploy")
    with deployed(folder, find_server(request.param), namespaces=("default", "second")) as number:
        yield number


def _client(port: int, user: str) -> redis.Redis:
    return redis.Redis(port=port, username=user, password=user)


def _config(port: int, worker: str) -> PrefixCacheConfig:
    return PrefixCacheConfig(
        url=f"redis://distprefix:distprefix@127.0.0.1:{port}",
        worker_id=worker,
        chunk_size=4,
        touch_interval_s=0,
        lookup_timeout_s=5,
        publish_timeout_s=5,
        strict=True,
    )


def _provision(port: int, *options: str) -> None:
    """Make the namespaces, as the operator."""
    made = run_cli("provision", "--url", f"redis://operator:operator@127.0.0.1:{port}", *options)
    assert made.returncode == 0, made.stderr


def test_worker_may_send_exactly_what_the_code_sends() -> None:
    """The commands of a worker are those of the scripts and of the client."""
    calls: set[str] = set()
    for path in (ROOT / "lua").rglob("*.lua"):
        calls |= {name.lower() for name in re.findall(r"redis\.p?call\('(\w+)'", path.read_text(encoding="utf-8"))}
    assert set(commands_of(Role.WORKER)) == calls | CLIENT


def test_cache_works_as_the_limited_user(port: int) -> None:
    """Publish, branch, look up, take back and clear, all as a worker, without a failure; the operator checks it."""
    _provision(port, "--namespace", "default", "--set", "chunk_size=4")
    where = ("--url", f"redis://operator:operator@127.0.0.1:{port}")
    with PrefixCacheOptimizer(_config(port, "a")) as first, PrefixCacheOptimizer(_config(port, "b")) as second:
        name = first.cache_prefix(TRUNK, block_ids=range(100), metadata={"kind": "trunk"})
        second.cache_prefix(TRUNK[:200] + list(range(1000, 1100)), block_ids=range(75))
        assert second.find_longest_cache_hit(TRUNK).matched_chunks == 100
        first.find_longest_cache_hit(TRUNK)
        assert first.update_prefix_state(name, range(100, 200))
        assert second.remove_skipped_blocks([60, 20]) == 2
        first.flush()
        second.flush()
        assert json.loads(run_cli("maintain", "--repair", "--json", *where).stdout)["problems"] == []
        first.clear()
        assert json.loads(run_cli("stats", "--json", *where).stdout)["nodes"] == 0
        assert first.get_metrics()["redis_failures"] == {}
        assert second.get_metrics()["redis_failures"] == {}


def test_nobody_gets_in_without_a_name(port: int) -> None:
    """The default user is off."""
    with (
        redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis.RedisError, match=r"[Aa]uthenticat"),
    ):
        client.ping()


def test_redis_evicts_nothing_and_keeps_snapshots(port: int) -> None:
    """The settings that the tree relies on are in force."""
    with _client(port, "inspector") as client:
        memory: Any = client.info("memory")
        persistence: Any = client.info("persistence")
        assert memory["maxmemory_policy"] == "noeviction"
        assert memory["maxmemory"] == 2**30
        assert persistence["aof_enabled"] == 0


def test_server_is_open_to_this_machine_alone(port: int) -> None:
    """Every address of the port is a loopback one; nothing answers at the machine's other addresses."""
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, type=socket.SOCK_STREAM)}
    for address in addresses:
        family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
        with socket.socket(family) as probe:
            probe.settimeout(5)
            is_loopback = str(address).startswith("127.") or address == "::1"
            assert (probe.connect_ex((address, port)) == 0) <= is_loopback
    text = (ROOT / "deploy" / "redis.conf").read_text(encoding="utf-8")
    assert re.findall(r"^(bind|protected-mode) (.*)$", text, re.MULTILINE) == [
        ("bind", "127.0.0.1 -::1"),
        ("protected-mode", "yes"),
    ]


@pytest.mark.parametrize("name", SERVERS)
def test_restart_keeps_the_tree(tmp_path: Path, name: str) -> None:
    """What was published before the server was told to stop is found after it has started again."""
    binary = find_server(name)
    with deployed(tmp_path, binary) as port, PrefixCacheOptimizer(_config(port, "a")) as cache:
        cache.cache_prefix(TRUNK)
    with deployed(tmp_path, binary) as port, PrefixCacheOptimizer(_config(port, "b")) as cache:
        assert cache.find_longest_cache_hit(TRUNK).matched_chunks == 100


def test_tls_as_the_page_makes_it(tmp_path: Path) -> None:
    """The commands of docs/production.md make certificates with which redis-tls.conf serves TLS and nothing else."""
    if shutil.which("openssl") is None:
        absent("openssl is not on PATH")
    (block,) = [each for each in re.findall(r"```sh\n(.*?)```", PRODUCTION, re.DOTALL) if "openssl" in each]
    script = block.replace("DNS:redis.example.net", "DNS:redis.example.net,IP:127.0.0.1")
    assert script != block
    (tmp_path / "deploy").mkdir()
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, capture_output=True)
    folder = tmp_path / "deploy"
    assert stat.S_IMODE((folder / "tls" / "server.key").stat().st_mode) == 0o600
    (folder / "users.acl").write_text(users_acl())
    try:
        with serving(folder, find_server("redis-7.0"), config="redis-tls.conf") as port:
            where = f"rediss://operator:operator@127.0.0.1:{port}?ssl_ca_certs={folder}/tls/ca.crt"
            done = run_cli("provision", "--url", where, "--namespace", "default", "--set", "chunk_size=4")
            assert done.returncode == 0, done.stderr
            worker = where.replace("operator:operator", "distprefix:distprefix")
            config = PrefixCacheConfig(url=worker, chunk_size=4, strict=True, lookup_timeout_s=5, publish_timeout_s=5)
            with PrefixCacheOptimizer(config) as cache:
                cache.cache_prefix(TRUNK)
                assert cache.find_longest_cache_hit(TRUNK).matched_chunks == 100
            plain = run_cli("stats", "--url", f"redis://operator:operator@127.0.0.1:{port}")
            assert "speaks TLS at this port" in plain.stderr
    except AssertionError as error:
        if "Bad directive" in str(error) and "tls-port" in str(error):
            absent("redis-server was built without TLS")
        raise


def _compose_commands() -> list[list[str]]:
    """Every call of our command line in docker-compose.yml."""
    found = re.findall(r"(?:&& (?:exec )?)(distprefix [^\"'\n]*)", COMPOSE)
    return [shlex.split(each) for each in found]


def test_compose_file_runs_as_its_head_says(tmp_path: Path) -> None:
    """Its first step makes users and passwords, mode 600; with them its provisioning and its nodes work."""
    text = COMPOSE.partition("x-redis")[0]
    (step,) = re.findall(r"distprefix (provision --users-only .*?)\n#\n", text, re.DOTALL)
    words = shlex.split(step.replace("\\\n#", " "))
    acl = tmp_path / "users.acl"
    env = tmp_path / ".env"
    replaced = {"deploy/users.acl": str(acl), ".env": str(env)}
    made = run_cli(*(replaced.get(word, word) for word in words))
    assert made.returncode == 0, made.stderr
    assert [stat.S_IMODE(path.stat().st_mode) for path in (acl, env)] == [0o600, 0o600]
    passwords = read_passwords(env)
    assert set(re.findall(r"\$\{(DP_\w+)", COMPOSE)) <= set(passwords)
    assert not any(password in acl.read_text() or password in made.stderr for password in passwords.values())
    binary = find_server("redis-8.2")
    cold = tmp_path / "cold"
    cold.mkdir()
    shutil.copy(acl, cold)
    with serving(tmp_path, binary) as port, serving(cold, binary, "--maxmemory", "2gb") as second:
        operator = f"redis://operator:{passwords['DP_OPERATOR_PASSWORD']}@127.0.0.1:{port}"
        worker = f"redis://worker:{passwords['DP_WORKER_PASSWORD']}@127.0.0.1:{port}"
        commands = _compose_commands()
        assert len(commands) == 3
        demo, provision, _ = commands
        done = run_cli(*provision[1:], "--url", operator)
        assert done.returncode == 0, done.stderr
        size = ("--sessions", "2", "--turns", "2")
        done = run_cli(
            *demo[1:], *size, "--url", worker, "--cold-url", worker.replace(str(port), str(second)), "--json"
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sharing"]["requests"] == 4


def test_compose_file_keeps_the_scripts(tmp_path: Path) -> None:
    """The command of its service `scripts` is one that goes on until it is stopped, and needs the operator alone."""
    (keeper,) = [words for words in _compose_commands() if "--scripts-only" in words]
    assert keeper[1:] == ["provision", "--scripts-only", "--every", "2"]
    (tmp_path / "users.acl").write_text(users_acl())
    with serving(tmp_path, find_server("valkey-9.1")) as port:
        done = run_cli(*keeper[1:3], "--url", f"redis://operator:operator@127.0.0.1:{port}")
        assert done.returncode == 0, done.stderr
        refused = run_cli(*keeper[1:3], "--url", f"redis://distprefix:distprefix@127.0.0.1:{port}")
        assert refused.returncode == 2
        assert "may not load scripts" in refused.stderr


def test_compose_file_has_no_password_and_opens_no_port() -> None:
    """Passwords come from the environment, or it ends with a message; ports are this machine's; images are pinned."""
    assert re.findall(r"redis://\w+:(?!\$\{DP_\w+:\?|PASSWORD@)", COMPOSE) == []
    uses = [line.strip() for line in COMPOSE.splitlines() if "${DP_" in line]
    assert uses
    assert all(re.match(r"DISTPREFIX_\w*URL: ", line) and ":?make users first" in line for line in uses)
    published = re.findall(r"- \"([\d.:]+)\"$", COMPOSE, re.MULTILINE)
    assert len(published) == 4
    assert all(each.startswith("127.0.0.1:") for each in published)
    images = re.findall(r"image: (\S+)", COMPOSE)
    assert len(images) == 3
    assert all(re.search(r":v?\d+\.\d+\.\d+", image) for image in images)
    volumes = re.findall(r"- (\w+):/data$", COMPOSE, re.MULTILINE)
    assert volumes == re.findall(r"^  (\w+):$", COMPOSE.partition("\nvolumes:\n")[2], re.MULTILINE)
    assert "\t" not in COMPOSE


def test_deploy_has_no_users() -> None:
    """No file of the repository has a user with a password: `distprefix provision` makes them, git ignores them."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {".env", "deploy/users.acl", "deploy/tls/"} <= set(ignored)
    for path in (ROOT / "deploy").glob("*.conf"):
        assert not re.search(r"^(user|requirepass|masterauth)\b", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_engines_of_the_compose_file_are_told_what_the_plug_in_takes() -> None:
    """Its transfer configuration is JSON that names our connector; where Redis is comes from the environment."""
    (told,) = re.findall(r"--kv-transfer-config '(\{.*?\})'", COMPOSE, re.DOTALL)
    config = json.loads(told)
    assert config == {"kv_connector": CONNECTOR, "kv_role": "kv_both"}
    names = set(re.findall(r"(DISTPREFIX_\w+): ", COMPOSE))
    assert names == {"DISTPREFIX_URL", "DISTPREFIX_COLD_URL"}
    settings = PrefixCacheConfig.from_env(dict.fromkeys(names, "redis://worker:x@redis:6379"))
    assert settings.url == settings.cold_url == "redis://worker:x@redis:6379"

"""TLS on both paths: every option of the URL, what is refused and how, and certificates renewed on disk."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import ConfigError, UnavailableError
from distprefix.redis.address import parse_address
from distprefix.redis.data import DataPool
from distprefix.redis.proof import prove
from tests.servers import Server, absent, find_server, free_port
from tests.values import MIB, noise, read, skip_all, soon

MARGIN_S = 0.3
TOKENS = list(range(64))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and what it signed for a server and a client."""
    if shutil.which("openssl") is None:
        absent("openssl is not on PATH")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other"):
        key = ("-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.crt")
        openssl("req", "-x509", *key, "-days", "2", "-subj", f"/CN={name}")
    for name, more in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "extendedKeyUsage=clientAuth")):
        (folder / "ext").write_text(more)
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", "csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext")
        openssl("x509", "-req", "-in", "csr", "-out", f"{name}.crt", "-days", "2", *signing)
    signing = ("-CA", "other.crt", "-CAkey", "other.key", "-CAcreateserial")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "renewed.key", "-out", "csr", "-subj", "/CN=client")
    openssl("x509", "-req", "-in", "csr", "-out", "renewed.crt", "-days", "2", *signing)
    openssl("pkey", "-in", "client.key", "-aes128", "-passout", "pass:hush", "-out", "locked.key")
    openssl("rehash", ".")
    (folder / "both.crt").write_text((folder / "ca.crt").read_text() + (folder / "other.crt").read_text())
    return folder


def _start(certificates: Path, authority: str = "ca") -> tuple[Server, str]:
    """A server with TLS that trusts clients of an authority, also at its plain socket; and host and port for TLS."""
    port = free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", f"{certificates}/server.crt"]
    options += ["--tls-key-file", f"{certificates}/server.key", "--tls-ca-cert-file", f"{certificates}/{authority}.crt"]
    try:
        server = Server(find_server("redis-7.0"), *options).start()
    except AssertionError as error:
        if "tls" not in str(error).partition("did not start")[2].lower():
            raise
        absent("redis-server was built without TLS")
    return server, f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def tls_server(certificates: Path) -> Iterator[tuple[Server, str]]:
    """A server that wants certificates of its clients, and where it is: the one binary here that was built with TLS."""
    server, where = _start(certificates)
    yield server, where
    server.stop()


def test_tls(tls_server: tuple[Server, str], certificates: Path) -> None:
    """Over TLS, with certificates on both sides, bytes come back, on one connection, and deadlines hold."""
    server, where = tls_server
    client = f"ssl_certfile={certificates}/client.crt&ssl_keyfile={certificates}/client.key"
    for trust in (f"ssl_ca_certs={certificates}/ca.crt", "ssl_cert_reqs=none"):
        pool = DataPool(f"rediss://{where}/1?{trust}&{client}", timeout_s=5)
        values = [(f"k{size}", [noise(size)[:size]]) for size in (0, 1, 70_000, 9 * MIB + 1)]
        assert all(pool.set(values, soon()))
        for _ in range(2):
            assert read(pool, *(key for key, _ in values), "missing") == [*(parts[0] for _, parts in values), None]
        assert pool.get([key for key, _ in values], skip_all, soon()) == [0, 1, 70_000, 9 * MIB + 1]
        assert len(pool._idle) == 1
        server.freeze()
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="in time"):
            read(pool, "k1", seconds=0.2)
        assert time.monotonic() - began < 0.2 + MARGIN_S
        server.thaw()
        assert (pool.failures, pool._idle) == ({"timeout": 1}, [])
        pool.close()


@pytest.mark.parametrize("authority", ["other", ""])
def test_tls_refused(tls_server: tuple[Server, str], certificates: Path, authority: str) -> None:
    """A server whose authority is not named, or another than was named, is refused."""
    trust = f"?ssl_ca_certs={certificates}/{authority}.crt" if authority else ""
    pool = DataPool(f"rediss://{tls_server[1]}{trust}", timeout_s=5)
    with pytest.raises(UnavailableError, match="certificate verify failed"):
        read(pool, "a")
    assert pool.failures == {"connect": 1}


def test_tls_host_name(tls_server: tuple[Server, str], certificates: Path) -> None:
    """A certificate for another host is refused unless the URL says not to look."""
    client = f"ssl_certfile={certificates}/client.crt&ssl_keyfile={certificates}/client.key"
    url = f"rediss://{tls_server[1].replace('127.0.0.1', 'localhost')}?ssl_ca_certs={certificates}/ca.crt&{client}"
    with pytest.raises(UnavailableError, match="certificate verify failed"):
        read(DataPool(url, timeout_s=5), "a")
    pool = DataPool(f"{url}&ssl_check_hostname=false", timeout_s=5)
    assert read(pool, "a") == [None]
    pool.close()


def test_tls_without_a_client_certificate(tls_server: tuple[Server, str], certificates: Path) -> None:
    """A server that wants a certificate and gets none ends the call, not the program."""
    pool = DataPool(f"rediss://{tls_server[1]}?ssl_ca_certs={certificates}/ca.crt", timeout_s=5)
    with pytest.raises(UnavailableError):
        read(pool, "a")


def _config(url: str, namespace: str, **settings: Any) -> PrefixCacheConfig:
    defaults: dict[str, Any] = {"lookup_timeout_s": 20.0, "publish_timeout_s": 20.0, "strict": True}
    defaults |= {"touch_interval_s": 0, "feed_interval_s": 0, "breaker_reset_s": 0.01}
    return PrefixCacheConfig(url=url, namespace=namespace, worker_id="w", **{**defaults, **settings})


def _client(certificates: Path, name: str = "client", key: str = "") -> str:
    return f"ssl_certfile={certificates}/{name}.crt&ssl_keyfile={certificates}/{key or name}.key"


@pytest.mark.parametrize(
    "options",
    [
        "ssl_ca_certs={0}/ca.crt&{1}",
        "ssl_ca_path={0}&{1}",
        "ssl_ca_data={2}&{1}",
        "ssl_cert_reqs=none&{1}",
        "ssl_cert_reqs=optional&ssl_ca_certs={0}/ca.crt&{1}",
        "ssl_check_hostname=false&ssl_ca_certs={0}/ca.crt&{1}",
        "ssl_min_version=771&ssl_ca_certs={0}/ca.crt&{1}",
        "ssl_min_version=TLSv1.3&ssl_ca_certs={0}/ca.crt&{1}",
        "ssl_ciphers=ECDHE%2BAESGCM&ssl_ca_certs={0}/ca.crt&{1}",
        "ssl_ca_certs={0}/ca.crt&ssl_certfile={0}/client.crt&ssl_keyfile={0}/locked.key&ssl_password=hush",
    ],
)
def test_every_option_counts_on_both_paths(
    tls_server: tuple[Server, str], certificates: Path, namespace: str, options: str
) -> None:
    """A cache opens, publishes, stores, loads and finds with each TLS option."""
    authority = quote((certificates / "ca.crt").read_text())
    url = f"rediss://{tls_server[1]}/1?{options.format(certificates, _client(certificates), authority)}"
    with PrefixCacheOptimizer(_config(url, namespace)) as cache:
        cache.cache_prefix(TOKENS)
        assert cache.store(TOKENS, [b"x" * 100] * 4) == 4
        assert cache.load(TOKENS).chunks == 4
        assert cache.find_longest_cache_hit(TOKENS, blocks_of="w/0@gpu").matched_chunks == 4


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("rediss://{h}?ssl_ca_certs={0}/ca.crt", "wants a certificate of its clients .*ssl_certfile and ssl_keyfile"),
        ("rediss://{h}?ssl_ca_certs={0}/ca.crt&{r}", "refuses the certificate in ssl_certfile"),
        ("rediss://{h}?{c}", "certificate of .* is not accepted .*ssl_ca_certs"),
        ("rediss://{h}?ssl_ca_certs={0}/other.crt&{c}", "certificate of .* is not accepted"),
        ("rediss://localhost:{p}?ssl_ca_certs={0}/ca.crt&{c}", "certificate of .*[Hh]ostname mismatch"),
        ("rediss://{h}?ssl_ca_certs={0}/absent.crt&{c}", "ssl_ca_certs is .*absent.crt': No such file"),
        ("rediss://{h}?ssl_ca_certs={0}/ca.crt&ssl_certfile={0}/client.crt", "ssl_certfile is"),
        (
            "rediss://{h}?ssl_certfile={0}/client.crt&ssl_keyfile={0}/server.key",
            "ssl_certfile and ssl_keyfile are .*belong together",
        ),
        (
            "rediss://{h}?ssl_certfile={0}/client.crt&ssl_keyfile={0}/locked.key&ssl_password=wrong",
            "ssl_password does not open the key",
        ),
        ("rediss://{h}?ssl_certfile={0}/client.crt&ssl_keyfile={0}/locked.key", "ssl_password does not open the key"),
        ("redis://{h}", "speaks TLS at this port: write rediss://"),
    ],
)
@pytest.mark.parametrize("setting", ["url", "cold_url"])
def test_opening_says_what_of_tls_fails(
    tls_server: tuple[Server, str], certificates: Path, namespace: str, setting: str, form: str, message: str
) -> None:
    """ConfigError names the setting, the option or part at fault and the remedy, for the tree and for cold payloads."""
    server, where = tls_server
    url = form.format(
        certificates, h=where, p=where.partition(":")[2], c=_client(certificates), r=_client(certificates, "renewed")
    )
    config = _config(server.url, namespace) if setting == "cold_url" else _config(url, namespace)
    with pytest.raises(ConfigError, match=message) as raised:
        PrefixCacheOptimizer(replace(config, **{setting: url}))
    assert str(raised.value).startswith(f"{setting}: ")


def test_a_port_without_tls(own_server: Server) -> None:
    """TLS to a plain port is named as such, whether the server answers the first bytes or waits for more."""
    for _ in range(5):  # they are random, and a line end among them has the server answer
        with pytest.raises(ConfigError, match="does not speak TLS at this port"):
            prove(parse_address(f"rediss://127.0.0.1:{own_server.port}"), 0.5)


def test_no_common_version(tls_server: tuple[Server, str], certificates: Path) -> None:
    """A server that has only TLS 1.2 refuses a client that wants 1.3, and the options to look at are named."""
    server, where = tls_server
    url = f"rediss://{where}?ssl_ca_certs={certificates}/ca.crt&{_client(certificates)}&ssl_min_version=772"
    with server.client() as admin:
        admin.config_set("tls-protocols", "TLSv1.2")
        try:
            with pytest.raises(ConfigError, match=r"TLS with .* fails .*ssl_min_version"):
                prove(parse_address(url), 5)
        finally:
            admin.config_set("tls-protocols", "")


def test_a_certificate_renewed_on_disk(certificates: Path, tmp_path: Path, namespace: str) -> None:
    """New connections of both paths read a renewed certificate; half a renewal is a failed call, and passes."""
    server, where = _start(certificates, "both")
    live = {kind: tmp_path / f"live.{kind}" for kind in ("crt", "key")}

    def renew(name: str, *kinds: str) -> None:
        for kind in kinds:
            shutil.copy(certificates / f"{name}.{kind}", live[kind])

    renew("client", "crt", "key")
    url = f"rediss://{where}?ssl_ca_certs={certificates}/ca.crt&{_client(tmp_path, 'live')}"
    try:
        with PrefixCacheOptimizer(_config(url, namespace, strict=False)) as cache, server.client() as admin:
            assert cache.store(TOKENS, [b"x" * 100] * 4) == 4
            renew("renewed", "crt")
            admin.config_set("tls-ca-cert-file", f"{certificates}/other.crt")  # which signed the renewed one alone
            _drop_clients(admin)
            assert cache.store([*TOKENS[1:], 1], [b"x"] * 4) == 0
            renew("renewed", "key")
            deadline = soon()
            others = [TOKENS[i:] + TOKENS[:i] for i in range(2, 60)]
            while not (stored := cache.store(others[0], [b"x"] * 4)) and time.monotonic() < deadline:
                others.pop(0)
            assert stored == 4
            assert cache.load(TOKENS).chunks == 4
            assert cache.find_stored(others[0]) == 4
    finally:
        server.stop()


def _drop_clients(admin: Any) -> None:
    admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def test_a_context_is_kept_while_files_do_not_change(certificates: Path, tmp_path: Path) -> None:
    """Connections share a context until a file is written or replaced; files of a folder are always read anew."""
    trust = tmp_path / "ca.crt"
    shutil.copy(certificates / "ca.crt", trust)
    address = parse_address(f"rediss://h?ssl_ca_certs={trust}")
    first = address.tls_context()
    assert first is not None
    assert address.tls_context() is first
    trust.write_text((certificates / "both.crt").read_text())
    second = address.tls_context()
    assert second is not None
    assert second is not first
    assert second.cert_store_stats()["x509"] == first.cert_store_stats()["x509"] + 1
    trust.unlink()
    with pytest.raises(OSError, match=r"ssl_ca_certs is .*No such file"):
        address.tls_context()
    folder = parse_address(f"rediss://h?ssl_ca_path={certificates}")
    assert folder.tls_context() is not folder.tls_context()

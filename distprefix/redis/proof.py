"""Proof at the opening of a cache that a server can be used as its URL says, and which part fails where it cannot."""

from __future__ import annotations

import logging
import ssl
import time
from dataclasses import replace

from distprefix.config import PrefixCacheConfig
from distprefix.errors import ConfigError, DistPrefixError, UnavailableError
from distprefix.redis.address import Address, parse_address
from distprefix.redis.resp import RefusedError, Wire, WireError
from distprefix.redis.tls import Tls

__all__ = ["prove", "prove_servers"]

_log = logging.getLogger("distprefix")
_PING = (b"PING",)
_SECOND_LOOK_S = 1.0
"""How long finding out why a connection failed may take on top."""
_REFUSED_CERTIFICATE = ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_")
"""Parts of the alerts with which a server refuses the client's certificate."""


def prove_servers(config: PrefixCacheConfig, timeout_s: float, *, with_url: bool) -> None:
    """Prove the data path of `url`, unless something else is used in its place, and `cold_url` where there is one.

    A cold server that is away is one warning: engines start without it. One PING for each. Raises as `prove`.
    """
    if with_url and config.url is not None:
        prove(parse_address(config.url, "url"), timeout_s, "url")
    if config.cold_url is not None:
        try:
            prove(parse_address(config.cold_url, "cold_url"), min(timeout_s, config.payload_timeout_s), "cold_url")
        except UnavailableError as error:
            _log.warning("cold payloads are not available for now: %s", error)


def prove(address: Address, timeout_s: float, setting: str = "url") -> None:
    """Log in, select the database and send one PING over a data connection.

    Raises ConfigError naming `setting`, the part at fault and the remedy for a wrong user, password or database and for
    TLS that fails; UnavailableError when the server cannot be reached, is silent for `timeout_s`, or says that it
    cannot serve now. A user who may not send PING has proven enough. Finding out what failed takes a second more.
    """
    address.check_tls(setting)
    try:
        wire = Wire(address, time.monotonic() + timeout_s)
        try:
            for command in (*address.greeting(), _PING):
                _say(wire, command, address, setting)
        finally:
            wire.close()
    except WireError as error:
        raise _explain(error, address, setting) from error


def _say(wire: Wire, command: tuple[bytes, ...], address: Address, setting: str) -> None:
    wire.request(*command)
    try:
        line = wire.line()
    except RefusedError as error:
        if command != _PING or error.code != "NOPERM":
            raise _judge(command[0], error, address, setting) from None  # a server may repeat what it was sent
        return
    if not line.startswith(b"+"):
        raise ConfigError(f"{setting}: what answers at {address} is no Redis: name the host and port of a Redis server")


def _judge(verb: bytes, error: RefusedError, address: Address, setting: str) -> DistPrefixError:
    """What an error in reply to a command of ours means."""
    text = str(error)
    code = error.code
    if code == "NOAUTH":
        return ConfigError(f"{setting}: {address} wants a password and none is given: write redis://USER:PASSWORD@HOST")
    if code == "WRONGPASS" or (verb == b"AUTH" and code == "ERR" and "invalid password" in text):
        return ConfigError(
            f"{setting}: {address} refuses the user name or password: correct them, or enable the user there "
            "(a password alone is written redis://:PASSWORD@HOST, with a colon)"
        )
    is_ours = code == "NOPERM" or (code == "ERR" and "max number" not in text)
    if verb == b"AUTH" and is_ours and ("AUTH" in text.upper() or "password" in text):
        return ConfigError(f"{setting}: {address} does not take a user name or password: remove what it does not know")
    if verb == b"SELECT" and is_ours:
        return ConfigError(f"{setting}: database {address.database} of {address} cannot be used ({text}): name another")
    if verb == b"CLIENT" and is_ours:
        return ConfigError(f"{setting}: {address} refuses client_name ({text}): remove it")
    return UnavailableError(f"{setting}: {address} cannot serve now: {code if verb == b'AUTH' else text}")


def _explain(error: WireError, address: Address, setting: str) -> DistPrefixError:
    """Why a connection failed, found out over further ones that send no password."""
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return ConfigError(
            f"{setting}: the certificate of {address} is not accepted ({cause.verify_message}): name its "
            "authority with ssl_ca_certs, or the host as the certificate does"
        )
    if address.tls is not None:
        if _answers_plainly(address):
            return ConfigError(
                f"{setting}: {address} does not speak TLS at this port: write redis://, or name its TLS port"
            )
        refusal = cause if _is_refusal(cause) else None
        if refusal is None and error.reason == "connection":
            refusal = _alert_of(address)
        if isinstance(refusal, ssl.SSLError):
            return ConfigError(f"{setting}: {_explain_tls(refusal, address, address.tls)}")
    elif not address.path and error.reason == "connection" and _speaks_tls(address):
        return ConfigError(f"{setting}: {address} speaks TLS at this port: write rediss://, or name its plain port")
    return UnavailableError(f"{setting}: {address} cannot be reached: {error}")


def _explain_tls(error: ssl.SSLError, address: Address, tls: Tls) -> str:
    reason = error.reason or str(error)
    if "CERTIFICATE_REQUIRED" in reason or ("HANDSHAKE_FAILURE" in reason and not tls.certfile):
        return (
            f"{address} wants a certificate of its clients ({reason}): name one with ssl_certfile and ssl_keyfile; "
            "where one is given, or ssl_ciphers is, look whether they suit the server"
        )
    if any(word in reason for word in _REFUSED_CERTIFICATE):
        return f"{address} refuses the certificate in ssl_certfile ({reason}): name one whose authority it trusts"
    return f"TLS with {address} fails ({reason}): look at ssl_min_version and ssl_ciphers, and at the server's"


def _is_refusal(cause: BaseException | None) -> bool:
    """Whether TLS failed for a reason, and not because the connection ended."""
    return isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError)


def _alert_of(address: Address) -> BaseException | None:
    """What a server that ends TLS connections says while nothing is sent: a write can end before its alert is read."""
    try:
        wire = Wire(address, time.monotonic() + _SECOND_LOOK_S)
        try:
            wire.line()
        finally:
            wire.close()
    except WireError as error:
        return error.__cause__ if _is_refusal(error.__cause__) else None
    except RefusedError:
        return None
    return None


def _answers_plainly(address: Address) -> bool:
    try:
        wire = Wire(replace(address, tls=None), time.monotonic() + _SECOND_LOOK_S)
        try:
            wire.request(*_PING)
            return wire.line().startswith(b"+")
        finally:
            wire.close()
    except RefusedError:
        return True
    except WireError:
        return False


def _speaks_tls(address: Address) -> bool:
    anyone = Tls(cert_reqs="none", check_hostname=False)
    try:
        Wire(replace(address, tls=anyone), time.monotonic() + _SECOND_LOOK_S).close()
    except WireError as error:
        return _is_refusal(error.__cause__) and "ALERT" in str(getattr(error.__cause__, "reason", ""))
    return True

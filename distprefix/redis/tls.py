"""TLS of a connection, the same for both paths. A new connection reads files again that have changed."""

from __future__ import annotations

import os
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

__all__ = ["TLS_OPTIONS", "Tls", "TlsSetupError", "read_tls"]

TLS_OPTIONS = (
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_ca_data",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_password",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_min_version",
    "ssl_ciphers",
)
"""Options of a URL that say how to encrypt."""
_REQUIREMENTS = ("none", "optional", "required")
_VERSIONS = {
    "771": ssl.TLSVersion.TLSv1_2,
    "tlsv1.2": ssl.TLSVersion.TLSv1_2,
    "772": ssl.TLSVersion.TLSv1_3,
    "tlsv1.3": ssl.TLSVersion.TLSv1_3,
}
_SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class TlsSetupError(OSError):
    """A file or value that TLS cannot use; the message names the option. An OSError: files come and go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """TLS options, named as in the URL without ``ssl_``. Empty texts are not given."""

    ca_certs: str = ""
    ca_path: str = ""
    ca_data: str = ""
    certfile: str = ""
    keyfile: str = ""
    password: str = field(default="", repr=False)
    cert_reqs: str = "required"
    check_hostname: bool = True
    min_version: ssl.TLSVersion | None = None
    ciphers: str = ""

    def context(self) -> ssl.SSLContext:
        """A context from the files as they are now. Raises TlsSetupError, which names the option at fault.

        It is kept while no file changes: making one reads all certificates of the system, 20 to 100 ms.
        """
        if self.ca_path:
            return self.new_context()  # OpenSSL reads files of a folder when it needs them, and keeps them
        defaults = ssl.get_default_verify_paths()
        files = (self.certfile, self.keyfile, self.ca_certs, defaults.cafile, defaults.capath)
        return _context(self, tuple(_version(file) for file in files))

    def new_context(self) -> ssl.SSLContext:
        """A context made anew. Raises as `context`."""
        context = ssl.create_default_context()
        context.check_hostname = self.check_hostname and self.cert_reqs != "none"
        context.verify_mode = ssl.VerifyMode[f"CERT_{self.cert_reqs.upper()}"]
        if self.certfile:
            self._load_certificate(context)
        if self.ca_certs:
            with _naming("ssl_ca_certs", self.ca_certs):
                context.load_verify_locations(cafile=self.ca_certs)
        if self.ca_path:
            if not Path(self.ca_path).is_dir():
                raise TlsSetupError(f"ssl_ca_path is {self.ca_path!r}: there is no such folder")
            with _naming("ssl_ca_path", self.ca_path):
                context.load_verify_locations(capath=self.ca_path)
        if self.ca_data:
            with _naming("ssl_ca_data"):
                context.load_verify_locations(cadata=self.ca_data)
        if self.min_version is not None:
            context.minimum_version = self.min_version
        if self.ciphers:
            with _naming("ssl_ciphers", self.ciphers):
                context.set_ciphers(self.ciphers)
        return context

    def _load_certificate(self, context: ssl.SSLContext) -> None:
        for option, path in (("ssl_certfile", self.certfile), ("ssl_keyfile", self.keyfile)):
            if path:
                with _naming(option, path), Path(path).open("rb"):
                    pass
        asked = False

        def password() -> str:  # without one OpenSSL asks on the terminal
            nonlocal asked
            asked = True
            return self.password

        try:
            context.load_cert_chain(self.certfile, self.keyfile or None, password)
        except OSError as error:
            if asked:
                raise TlsSetupError(f"ssl_password does not open the key in ssl_keyfile: {_reason(error)}") from error
            given = "ssl_certfile and ssl_keyfile are" if self.keyfile else "ssl_certfile is"
            files = " and ".join(repr(path) for path in (self.certfile, self.keyfile) if path)
            raise TlsSetupError(f"{given} {files}: {_reason(error)}; both must be PEM and belong together") from error


def read_tls(options: dict[str, str]) -> Tls:
    """TLS from the options of a URL that `TLS_OPTIONS` lists. Raises ValueError naming the option. Reads no file."""
    given = {name.removeprefix("ssl_"): value for name, value in options.items()}
    requirement = given.pop("cert_reqs", "required").lower()
    if requirement not in _REQUIREMENTS:
        raise ValueError(f"ssl_cert_reqs is {requirement!r}: it must be {', '.join(_REQUIREMENTS)}")
    check = given.pop("check_hostname", "true").lower()
    if check not in _SWITCHES:
        raise ValueError(f"ssl_check_hostname is {check!r}: it must be true or false")
    version = given.pop("min_version", "").lower()
    if version and version not in _VERSIONS:
        raise ValueError(f"ssl_min_version is {version!r}: it must be TLSv1.2 or TLSv1.3 (771 or 772)")
    if "certfile" not in given:
        for name in ("keyfile", "password"):
            if name in given:
                raise ValueError(f"ssl_{name} is given without ssl_certfile: name the certificate too")
    return Tls(cert_reqs=requirement, check_hostname=_SWITCHES[check], min_version=_VERSIONS.get(version), **given)


@lru_cache(maxsize=16)
def _context(tls: Tls, files: tuple[tuple[int, int, int] | None, ...]) -> ssl.SSLContext:
    del files  # versions of the files, taken before they are read: what changes meanwhile is read next time
    return tls.new_context()


def _version(file: str | None) -> tuple[int, int, int] | None:
    """What differs once a file was written or replaced; None for one that is not there."""
    try:
        status = os.stat(file or "")  # noqa: PTH116 - Path("") would be the working directory
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


@contextmanager
def _naming(option: str, value: str | None = None) -> Generator[None]:
    """Raise what goes wrong as TlsSetupError that names the option, with its value unless that is data."""
    try:
        yield
    except (OSError, ValueError) as error:
        shown = f"{option} is {value!r}" if value is not None else f"{option} cannot be used"
        raise TlsSetupError(f"{shown}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

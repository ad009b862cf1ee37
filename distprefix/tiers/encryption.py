"""Encryption of payloads at rest: AES-GCM, keys by number, so that they can be changed while payloads live.

Pure but for the random nonces. Needs `cryptography`, which comes with distprefix[payloads]. Nonces are random, so one
key is good for 2^32 payloads: put a new key in front of the list before that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from distprefix.errors import ConfigError, DamagedPayloadError, UnreadablePayloadError

__all__ = ["OVERHEAD", "KeyRing"]

_NONCE = 12
OVERHEAD = _NONCE + 16
"""Bytes that an encrypted body has more: the nonce before it, the tag behind it."""
_ID_LIMIT = 1 << 32
_FORMS = "write id:key pairs, the key as 32 or 64 hex digits, joined by commas; the first one encrypts"


class KeyRing:
    """Keys by id: one encrypts, all decrypt. Safe to share between threads; never shows a key."""

    __slots__ = ("_ciphers", "_proven", "active")

    def __init__(self, keys: Mapping[int, bytes], active: int) -> None:
        """Keys have 16 or 32 bytes, ids lie in [1, 2^32); `active` is the id of the key that encrypts."""
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - an extra, used only here
        except ImportError:
            raise ConfigError("encryption needs cryptography: pip install 'distprefix[payloads]'") from None
        for key_id, key in keys.items():
            if not 0 < key_id < _ID_LIMIT:
                raise ConfigError(f"encryption key id {key_id} is not allowed: ids lie in [1, 2^32)")
            if len(key) not in (16, 32):
                raise ConfigError(f"encryption key {key_id} has {len(key)} bytes: 16 or 32 are allowed")
        if active not in keys:
            raise ConfigError(f"encryption key {active} is to encrypt but is not among the keys")
        self.active = active
        self._proven: set[int] = set()
        """Ids of keys that have opened a payload."""
        self._ciphers: dict[int, Any] = {key_id: AESGCM(key) for key_id, key in keys.items()}

    @classmethod
    def from_text(cls, text: str) -> KeyRing:
        """Keys as configuration and environment have them: ``id:hex,id:hex``, of which the first encrypts."""
        keys: dict[int, bytes] = {}
        for i, part in enumerate(text.split(","), 1):
            key_id, colon, digits = (piece.strip() for piece in part.partition(":"))
            if not colon or not re.fullmatch(r"[0-9]{1,10}", key_id, re.ASCII):
                raise ConfigError(f"encryption key number {i} in the list has no id: {_FORMS}")
            if not re.fullmatch(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{64}", digits):
                raise ConfigError(f"encryption key {int(key_id)} is not 32 or 64 hex digits: {_FORMS}")
            if int(key_id) in keys:
                raise ConfigError(f"encryption key {int(key_id)} is there twice: give each key an id of its own")
            keys[int(key_id)] = bytes.fromhex(digits)
        return cls(keys, next(iter(keys)))

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of all keys."""
        return tuple(self._ciphers)

    def encrypt(self, data: memoryview, associated: bytes) -> bytearray:
        """Nonce, encrypted data and tag; `associated` is what else must be the same when it is decrypted."""
        body = bytearray(len(data) + OVERHEAD)
        body[:_NONCE] = nonce = os.urandom(_NONCE)
        self._ciphers[self.active].encrypt_into(nonce, data, associated, memoryview(body)[_NONCE:])
        return body

    def decrypt(self, key_id: int, body: memoryview, associated: bytes, target: memoryview) -> None:
        """Decrypt into a buffer of just the right size.

        Raises UnreadablePayloadError without the right key, DamagedPayloadError with it.
        """
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra, used only here

        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise UnreadablePayloadError(f"the payload is encrypted with key {key_id}, which is not configured")
        try:
            cipher.decrypt_into(bytes(body[:_NONCE]), body[_NONCE:], associated, target)
        except InvalidTag:
            # A key that has opened something is the right one; another one under the same id proves nothing.
            kind = DamagedPayloadError if key_id in self._proven else UnreadablePayloadError
            raise kind(
                f"the payload cannot be decrypted with key {key_id}: it is another key's, or was changed"
            ) from None
        self._proven.add(key_id)

    def __repr__(self) -> str:
        return f"<KeyRing of {', '.join(map(str, self.ids))}; {self.active} encrypts>"

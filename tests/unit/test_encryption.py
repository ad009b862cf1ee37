"""Keys: how they are written, and that nothing but the right one opens."""

from __future__ import annotations

import os
import sys

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from distprefix.errors import ConfigError, DamagedPayloadError, UnreadablePayloadError
from distprefix.tiers.encryption import OVERHEAD, KeyRing

_KEY = "00112233445566778899aabbccddeeff"
_LONG = _KEY + _KEY[::-1]


def test_keys_are_read_from_text() -> None:
    """The first key encrypts, all are there, and spaces and capitals do not matter."""
    keys = KeyRing.from_text(f" 3:{_KEY} , 4294967295 : {_LONG.upper()},1:{_LONG}")
    assert (keys.active, keys.ids) == (3, (3, 4294967295, 1))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "number 1 in the list has no id"),
        (_KEY, "number 1 in the list has no id"),
        (f"1:{_KEY},", "number 2 in the list has no id"),
        (f"{_KEY}:1", "number 1 in the list has no id"),
        (f"-1:{_KEY}", "number 1 in the list has no id"),
        (f"٣:{_KEY}", "number 1 in the list has no id"),
        (f"0:{_KEY}", "key id 0 is not allowed"),
        (f"4294967296:{_KEY}", "key id 4294967296 is not allowed"),
        (f"1:{_KEY}0", "key 1 is not 32 or 64 hex digits"),
        (f"1:{_KEY[:-1]}x", "key 1 is not 32 or 64 hex digits"),
        (f"1:{_KEY}{_KEY[:16]}", "key 1 is not 32 or 64 hex digits"),
        (f"1:{_KEY}:{_KEY}", "key 1 is not 32 or 64 hex digits"),
        ("1:", "key 1 is not 32 or 64 hex digits"),
        (f"1:{_KEY},1:{_LONG}", "key 1 is there twice"),
    ],
)
def test_a_mistake_is_told_without_the_key(text: str, told: str) -> None:
    """Whatever is wrong with the text, the message says where, and never shows a part of a key."""
    with pytest.raises(ConfigError, match=told) as caught:
        KeyRing.from_text(text)
    assert "2233" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_a_mistake_in_a_mapping_is_told_without_the_key() -> None:
    """Keys of another size, ids out of range and a missing active key are refused."""
    for keys, active in (({1: bytes.fromhex(_KEY) + b"x"}, 1), ({0: bytes(16)}, 0), ({1: bytes(16)}, 2), ({}, 1)):
        with pytest.raises(ConfigError, match="encryption key") as caught:
            KeyRing(keys, active)
        assert "3D" not in str(caught.value)


def test_keys_are_never_shown() -> None:
    """Neither repr nor str shows a key; ids they do show."""
    keys = KeyRing.from_text(f"3:{_KEY},9:{_LONG}")
    assert repr(keys) == str(keys) == "<KeyRing of 3, 9; 3 encrypts>"
    assert not hasattr(keys, "__dict__")


@pytest.mark.parametrize("digits", [_KEY, _LONG])
def test_it_is_plain_aes_gcm(digits: str) -> None:
    """What is written can be read with nothing but the key and AES-GCM, and back."""
    keys, cipher = KeyRing.from_text(f"3:{digits}"), AESGCM(bytes.fromhex(digits))
    body = bytes(keys.encrypt(memoryview(b"payload"), b"chunk"))
    assert len(body) == 7 + OVERHEAD
    assert cipher.decrypt(body[:12], body[12:], b"chunk") == b"payload"
    nonce, target = os.urandom(12), memoryview(bytearray(5))
    keys.decrypt(3, memoryview(nonce + cipher.encrypt(nonce, b"other", b"chunk")), b"chunk", target)
    assert target == b"other"


def test_no_nonce_comes_twice() -> None:
    """The same payload encrypts to something else each time."""
    keys = KeyRing.from_text(f"3:{_KEY}")
    bodies = {bytes(keys.encrypt(memoryview(b"payload"), b"chunk")) for _ in range(1000)}
    assert len({body[:12] for body in bodies}) == len({body[12:] for body in bodies}) == 1000


def test_only_the_right_key_opens() -> None:
    """Another key, other associated data, a flipped bit and an unknown id are refused, the id named.

    That is damage where the key is known to be right, because it has opened something.
    """
    keys = KeyRing.from_text(f"3:{_KEY},4:{_LONG}")
    body, target = bytes(keys.encrypt(memoryview(b"payload"), b"chunk")), memoryview(bytearray(7))
    with pytest.raises(UnreadablePayloadError, match="with key 3"):
        keys.decrypt(3, memoryview(body), b"chunks", target)
    keys.decrypt(3, memoryview(body), b"chunk", target)
    for bit in range(8 * len(body)):
        flipped = bytearray(body)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedPayloadError, match="with key 3"):
            keys.decrypt(3, memoryview(flipped), b"chunk", target)
    with pytest.raises(DamagedPayloadError, match="key 3"):
        keys.decrypt(3, memoryview(body), b"chunks", target)
    for key_id in (4, 5):
        with pytest.raises(UnreadablePayloadError, match=f"with key {key_id}"):
            keys.decrypt(key_id, memoryview(body), b"chunk", target)


def test_what_to_install_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cryptography, keys are refused with the command that installs it."""
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match=r"pip install 'distprefix\[payloads\]'"):
        KeyRing.from_text(f"3:{_KEY}")

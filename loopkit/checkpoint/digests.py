"""Checksums of files and tensors, as text that names its method: ``xxh3-128:…``, ``sha256:…``."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import xxhash

from loopkit.errors import CorruptCheckpointError

FILE = "xxh3-128"
"""The method for a whole file. It finds damage. It is no proof against somebody who forges a file."""

CHUNK = "xxh3-64"
"""The method for the part of a tensor that a file holds."""


class _CRC32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


# The last two are those of format version 1.
_METHODS: dict[str, Any] = {
    FILE: xxhash.xxh3_128,
    CHUNK: xxhash.xxh3_64,
    "sha256": hashlib.sha256,
    "crc32": _CRC32,
}


class Digest:
    """A checksum that grows with the bytes it is given.

    Args:
        method: :data:`FILE` or :data:`CHUNK`, or one of format version 1.
    """

    def __init__(self, method: str):
        self._method = method
        self._state = _METHODS[method]()
        self.update = self._state.update

    @property
    def text(self) -> str:
        """The method, a colon, and the checksum in hex."""
        return f"{self._method}:{self._state.hexdigest()}"


def like(text: str) -> Digest:
    """Return an empty digest by the method that ``text`` names.

    Raises:
        CorruptCheckpointError: there is no such method.
    """
    method = text.partition(":")[0]
    if method not in _METHODS:
        raise CorruptCheckpointError(f"unknown checksum {text[:60]!a}")
    return Digest(method)


def of(data: bytes | memoryview, method: str = FILE) -> str:
    """Return the checksum of ``data`` as text."""
    digest = Digest(method)
    digest.update(data)
    return digest.text

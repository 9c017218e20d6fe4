"""The memory of cards by name, and sizes as people write them."""

from __future__ import annotations

import re

from loopkit.errors import OptionError, nearest

# Gigabytes, from the vendors' data sheets.
CARDS = {
    "t4": 16, "v100": 32, "a10": 24, "a100": 80, "a100-40": 40, "l4": 24, "l40s": 48, "rtx3090": 24,
    "rtx4090": 24, "rtx5090": 32, "rtx6000": 48, "h100": 80, "h200": 141, "b200": 180, "mi250x": 128,
    "mi300x": 192,
}  # fmt: skip
# What torch's allocator does not give to tensors: the device's context, buffers of NCCL and cuBLAS,
# and memory in pieces that are too small.
RESERVED = 0.1
_UNITS = {"": 1e9, "gb": 1e9, "g": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}


def card_bytes(text: str) -> int:
    """Return the bytes of a card: a name of ``CARDS``, or a size as "80GB" or "24 GiB".

    Raises:
        OptionError: it is neither.
    """
    name = text.strip().lower().replace("_", "-")
    if name in CARDS:
        return int(CARDS[name] * 1e9)
    found = re.fullmatch(r"([\d.]+)\s*([a-z]*)", name)
    if found is None or found[2] not in _UNITS or found[1].count(".") > 1 or not float(found[1]):
        raise OptionError(
            f"--card {text}: give a size, as 80GB, or one of {', '.join(CARDS)}.{nearest(name, CARDS)}"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def usable(size: int) -> int:
    """Return the bytes of a card that tensors can use."""
    return int(size * (1 - RESERVED))

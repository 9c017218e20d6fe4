"""The memory that torch frees on the CPU: the process keeps it for the next step of a run."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# What glibc itself goes up to, when a program has freed such blocks: see mallopt(3).
MOST_MMAP = 32 * 2**20
_MOST_TRIM = 2 * MOST_MMAP
_NEVER = -1
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")

_RUNS: list[torch.device] = []  # inside of each other, such as an evaluation in a hook


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Inside, the C library gives freed memory back to torch, and not to the system.

    A step frees its activations and gradients, and the next one needs the same again. glibc returns
    much of that to the system, which clears every page before it hands it out once more. This took
    4 to 20 % of a step's time (docs/decisions/cpu-memory.md). The peak is the same. At the
    end the process returns what is free.

    Nothing changes on another device than the CPU, with another C library, or where the environment
    sets one of glibc's limits.

    Args:
        device: where the run computes.
    """
    libc = glibc(os.environ) if device.type == "cpu" else None
    if libc is None or not libc.mallopt(_MMAP_THRESHOLD, MOST_MMAP):
        yield
        return
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    _RUNS.append(device)
    try:
        yield
    finally:
        _RUNS.pop()
        if not _RUNS:
            libc.mallopt(_TRIM_THRESHOLD, _MOST_TRIM)
            return_freed_memory()


def return_freed_memory() -> None:
    """Give the system what is free; another C library than glibc decides for itself."""
    libc = glibc({})
    if libc is not None:
        libc.malloc_trim(0)


def glibc(environment: Mapping[str, str]) -> Any:
    """Return the C library; None if it is not glibc, or ``environment`` sets limits of its malloc."""
    given = "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    if given or any(name in environment for name in _OWN) or not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None

"""The devices of this machine: find one by name, count them, list those a model can use."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch

from loopkit.errors import OptionError

ACCELERATORS = ("auto", "cpu", "cuda", "mps")


def find_device(accelerator: str, index: int | None = None) -> torch.device:
    """Return the device that ``accelerator`` names; "auto" takes a GPU if the machine has one.

    Args:
        accelerator: one of ``ACCELERATORS``, or a device with its number, such as "cuda:1".
        index: the number of the GPU; None takes torch's current one.

    Raises:
        OptionError: the name is unknown, or this machine has no such device.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if accelerator == "auto":
        accelerator = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    kind = accelerator.split(":")[0]
    if kind not in available:
        raise OptionError(
            f"accelerator={accelerator!r} is not known: give one of {', '.join(ACCELERATORS)}"
        )
    if not available[kind]:
        found = ", ".join(name for name, there in available.items() if there)
        raise OptionError(f"accelerator={accelerator!r} is not on this machine, which has: {found}")
    if accelerator != "cuda":
        return torch.device(accelerator)
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise OptionError(
            f"this process has local rank {index} on a machine with {count} GPUs: start fewer "
            "processes, or pass accelerator='cpu'"
        )
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def count_devices(kind: str) -> int:
    """Return how many devices of ``kind`` ("cpu", "cuda", "mps", …) this machine has."""
    if kind in ("cpu", "mps"):
        return int(kind == "cpu" or torch.backends.mps.is_available())
    return int(getattr(getattr(torch, kind, None), "device_count", int)())


def visible_devices(accelerator: str = "auto", count: int | str = "auto") -> list[torch.device]:
    """Return the devices that one process can use: all GPUs, or the one device of another kind.

    Args:
        accelerator: one of ``ACCELERATORS``.
        count: how many to return; "auto" returns all.

    Raises:
        OptionError: this machine has fewer than ``count``.
    """
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = gpus if gpus and accelerator in ("auto", "cuda") else [find_device(accelerator)]
    if isinstance(count, int) and count > len(found):
        raise OptionError(
            f"devices={count}: layers can be spread over {len(found)}, {', '.join(map(str, found))}"
        )
    return found[: count if isinstance(count, int) else None]


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that were held: by torch on an accelerator, by the process on the CPU.

    None where the system or the device does not tell.
    """
    if device.type == "cpu":
        return peak_bytes()
    measure = getattr(getattr(torch, device.type, None), "max_memory_allocated", None)
    return None if measure is None else int(measure(device))


def peak_bytes() -> int | None:
    """Return the most memory that this process has held; None if the system does not tell."""
    with suppress(OSError):
        return process_bytes("VmHWM")
    try:
        resource = import_module("resource")
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def process_bytes(name: str) -> int:
    """Return a size of this process, such as "VmRSS".

    Raises:
        OSError: the system has no ``/proc``.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

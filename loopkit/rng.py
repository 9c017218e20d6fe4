"""Random seeds as a hash of a position in training, and the generators that they seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

_MASK = 0xFFFFFFFFFFFFFFFF
_seed_torch = torch.default_generator.manual_seed
# random.seed wraps this method of a hidden instance. An int does not need the wrapper.
_seed_python: Any = vars(random.Random.__base__)["seed"]
_python_generator: Any = vars(random)["_inst"]
_WATCH = 0x6C6F6F706B6974  # any number does: no sample is made of its streams
_following: dict[str, bytes] = {}  # what each generator gives after it

GENERATORS = ("torch", "python", "numpy")
"""The generators of the CPU that ``seed_all`` seeds."""


def mix(*parts: int) -> int:
    """Return a 63-bit hash of integers, the same in every process and on every machine.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), folded over the parts.
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ part) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def at_step(base: int, step: int, micro: int) -> int:
    """Return a 63-bit hash of a step and a micro-batch: ``mix`` for the hot path.

    Args:
        base: a hash from ``mix``.
        step: the number of the optimizer step.
        micro: the number of the micro-batch over all ranks.
    """
    state = (base + step * 0x9E3779B97F4A7C15 + micro * 0xD1B54A32D192ED03) & _MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
    return state >> 1


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed torch on the CPU and on ``device``, Python's random, and NumPy's global generator."""
    torch_seeder(device or torch.device("cpu"))(seed)
    seed_python(seed)
    seed_numpy(seed)


def seed_python(seed: int) -> None:
    """Seed Python's random."""
    _seed_python(_python_generator, seed)
    _python_generator.gauss_next = None


def seed_numpy(seed: int) -> None:
    """Seed NumPy's global generator with the low 32 bits of ``seed``."""
    numpy.random.seed(seed & 0xFFFFFFFF)


def seed(value: int, names: Iterable[str]) -> None:
    """Seed some of ``GENERATORS``."""
    for name in names:
        _SEEDERS[name](value)


def torch_seeder(device: torch.device) -> Callable[[int], object]:
    """Return a function that seeds torch on the CPU and on ``device``, in about a microsecond."""
    if device.type == "cpu":
        return _seed_torch

    def seed(value: int) -> None:
        _seed_torch(value)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(value)
        elif device.type == "mps":
            torch.mps.manual_seed(value)

    return seed


def get_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the state of the generators that ``seed_all`` seeds, as values and CPU tensors."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device is not None and device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def changed(state: dict[str, Any]) -> set[str]:
    """Return which of ``GENERATORS`` have left a state that ``get_state`` returned."""
    now: Any = numpy.random.get_state()
    kind, keys, *rest = state["numpy"]
    same = {
        "torch": torch.equal(state["torch"], torch.get_rng_state()),
        "python": state["python"] == random.getstate(),
        "numpy": (kind, rest) == (now[0], [*now[2:]]) and keys.tobytes() == now[1].tobytes(),
    }
    return {name for name in GENERATORS if not same[name]}


def watch(names: Iterable[str]) -> None:
    """Seed some of ``GENERATORS`` with a fixed number, so that ``drawn`` notices a draw."""
    for name in names:
        if name not in _following:
            _SEEDERS[name](_WATCH)
            _following[name] = _NEXT[name]()
        _SEEDERS[name](_WATCH)


def drawn(names: Iterable[str]) -> set[str]:
    """Return which of the generators that ``watch`` was given have given a number since.

    It draws from them itself. The 128 bits that NumPy and Python give next are compared with those
    that follow the seed: as many in the middle of a stream are others, but for a chance of 2**-128.
    A look at the whole states takes six times as long, as NumPy copies its state number by number.
    """
    return {name for name in names if _NEXT[name]() != _following[name]}


_SEEDERS: dict[str, Callable[[int], object]] = {
    "torch": _seed_torch,
    "python": seed_python,
    "numpy": seed_numpy,
}
_NEXT: dict[str, Callable[[], bytes]] = {
    "torch": lambda: torch.get_rng_state().numpy().tobytes(),
    "python": lambda: _python_generator.randbytes(16),
    "numpy": lambda: numpy.random.bytes(16),
}


def set_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Restore a state that ``get_state`` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    if "mps" in state and device is not None and device.type == "mps":
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def preserved(device: torch.device | None = None) -> Iterator[None]:
    """Restore the state of the generators after the block."""
    state = get_state(device)
    try:
        yield
    finally:
        set_state(state, device)

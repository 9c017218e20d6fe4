"""Snapshots for the checkpoint tests, and what it means that two are the same."""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

import numpy as np
import torch

from loopkit.checkpoint import Snapshot


def make(seed: int, step: int | None = None, metrics: dict[str, float] | None = None) -> Snapshot:
    """A small snapshot with everything in it; equal seeds give equal snapshots."""
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(17, 5, generator=made)
    model = {
        "embed.weight": weight,
        "head.weight": weight,
        "bias": torch.randn(7, generator=made).to(torch.bfloat16),
        "steps": torch.tensor(seed),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(4, 6, generator=made).t(),
    }
    return Snapshot(
        tensors={
            "model": model,
            "optimizer": {
                f"{name}/exp_avg": torch.randn(t.shape, generator=made) for name, t in model.items()
            },
        },
        state={
            "counters": {"step": step if step is not None else seed, "samples": 10**20 + seed},
            "rng": torch.randint(0, 255, (64,), generator=made, dtype=torch.uint8),
            "hooks": {
                "Curve": {"window": deque([1.5, float("nan")], maxlen=4), "seen": (1, {"a", 2})}
            },
            "array": np.arange(seed % 5 + 1, dtype=np.float32),
        },
        meta={
            "step": step if step is not None else seed,
            "epoch": seed // 10,
            "samples": seed * 8,
            "kind": "full",
            "metrics": metrics or {"eval/accuracy": (seed % 7) / 7},
        },
        files={"config.json": b'{"model_type": "tiny"}', "tokenizer/vocab.txt": b"a\nb\n"},
    )


def alike(a: Any, b: Any) -> bool:
    """Equal with types, bits of floats, order of dicts."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Snapshot):
        metas = [{k: v for k, v in s.meta.items() if k != "generation"} for s in (a, b)]
        return (
            a.tensors.keys() == b.tensors.keys()
            and all(alike_tensors(a.tensors[prefix], b.tensors[prefix]) for prefix in a.tensors)
            and alike(a.state, b.state)
            and metas[0] == metas[1]
            and a.files == b.files
        )
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        flat = (
            [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)] if same else []
        )
        return same and torch.equal(flat[0], flat[1])
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex):
        return alike((a.real, a.imag), (b.real, b.imag))
    if isinstance(a, dict):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a.items(), b.items()))
    if isinstance(a, set | frozenset):
        # No two elements of the tests' sets are equal with different types.
        return len(a) == len(b) and sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, deque) and a.maxlen != b.maxlen:
        return False
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b))
    return bool(a == b)


def alike_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)

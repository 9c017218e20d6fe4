"""Time to save and load a large state: loopkit's checkpoints, torch.save and safetensors.

    python benchmarks/checkpoint.py --folder /some/disk

Loading reads files that were just written, so all contestants read from the page cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors.torch
import torch

from benchmarks import record
from loopkit.checkpoint import Snapshot, Store, read_checkpoint, write_checkpoint

State = dict[str, torch.Tensor]


def made(megabytes: int, tensors: int) -> State:
    """Return random float32 tensors of equal size. No writer can skip them as zeros."""
    each = megabytes * 1_000_000 // (4 * tensors)
    return {f"layer{i}.weight": torch.randn(each) for i in range(tensors)}


def synced(path: Path) -> None:
    """Wait until the file ``path`` is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def save_loopkit(state: State, folder: Path) -> None:
    write_checkpoint(
        Store(), folder, Snapshot({"model": state}, {}, {"kind": "weights", "step": 1})
    )


def load_loopkit(folder: Path) -> State:
    return dict(
        read_checkpoint(Store(), folder / "checkpoints" / "step-000000000001").tensors["model"]
    )


def save_torch(state: State, folder: Path) -> None:
    torch.save(state, folder / "state.pt")


def load_torch(folder: Path) -> State:
    return dict(torch.load(folder / "state.pt", weights_only=True))


def save_safetensors(state: State, folder: Path) -> None:
    safetensors.torch.save_file(state, folder / "state.safetensors")


def load_safetensors(folder: Path) -> State:
    # safetensors maps the file into memory. Read it all, as a copy into a model does.
    return {
        name: tensor.clone()
        for name, tensor in safetensors.torch.load_file(folder / "state.safetensors").items()
    }


def durable(save: Callable[[State, Path], None], name: str) -> Callable[[State, Path], None]:
    """Return a function that calls ``save`` and then waits for the disk."""

    def saved(state: State, folder: Path) -> None:
        save(state, folder)
        synced(folder / name)

    return saved


CONTESTANTS: dict[str, tuple[Any, Any, str, str]] = {
    "loopkit": (save_loopkit, load_loopkit, "yes", "yes"),
    "torch.save": (save_torch, load_torch, "no", "no"),
    "torch.save and fsync": (durable(save_torch, "state.pt"), load_torch, "yes", "no"),
    "safetensors": (save_safetensors, load_safetensors, "no", "no"),
    "safetensors and fsync": (
        durable(save_safetensors, "state.safetensors"),
        load_safetensors,
        "yes",
        "no",
    ),
}


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="Seconds to save and load a state.")
    parser.add_argument(
        "--megabytes", type=int, default=400, help="size of the state (default: %(default)s)"
    )
    parser.add_argument(
        "--tensors", type=int, default=100, help="tensors in it (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="times each (default: %(default)s)")
    parser.add_argument(
        "--folder", help="where to write (default: the system's folder for temporary files)"
    )
    args = parser.parse_args()
    state = made(args.megabytes, args.tensors)
    times: dict[str, dict[str, list[float]]] = {
        name: {"save": [], "load": []} for name in CONTESTANTS
    }
    for number in range(args.rounds + 1):  # the first round warms up
        for name, (save, load, _, _) in CONTESTANTS.items():
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                # No contestant pays for data that another one left to be written.
                os.sync()
                began = perf_counter()
                save(state, Path(folder))
                middle = perf_counter()
                loaded = load(Path(folder))
                ended = perf_counter()
            if any(not torch.equal(loaded[key], tensor) for key, tensor in state.items()):
                raise RuntimeError(f"{name} loaded another state than it saved")
            if number:
                times[name]["save"].append(middle - began)
                times[name]["load"].append(ended - middle)
    summary: dict[str, dict[str, Any]] = {}
    for name, (_, _, on_disk, checked) in CONTESTANTS.items():
        save, load = (record.quartiles(times[name][what]) for what in ("save", "load"))
        summary[name] = {"save": save, "load": load, "durable": on_disk, "verified": checked}
        print(
            f"{name:24} save {save['median']:6.2f} s ({save['low']:.2f} to {save['high']:.2f})   "
            f"load {load['median']:6.2f} s ({load['low']:.2f} to {load['high']:.2f})"
        )
    record.save(
        "checkpoint",
        {
            "megabytes": args.megabytes,
            "tensors": args.tensors,
            "rounds": args.rounds,
            "versions": record.versions(("torch", "safetensors", "loopkit-torch")),
            "seconds": summary,
        },
    )


if __name__ == "__main__":
    main()

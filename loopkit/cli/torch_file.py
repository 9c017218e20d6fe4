"""Reads a file of ``torch.save`` and writes its weights as a checkpoint: a program of its own.

``loopkit ckpt import`` runs it, because reading an arbitrary file of ``torch.save`` runs code that
the file names. Without ``--trust``, torch reads tensors and plain values alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loopkit.checkpoint import Snapshot, Store
from loopkit.checkpoint.codecs import encode
from loopkit.checkpoint.writer import write_checkpoint
from loopkit.errors import CheckpointError, LoopkitError, RunDirError
from loopkit.version import __version__


def main(argv: Sequence[str]) -> int:
    """Write the weights of ``FILE`` under ``RUN_DIR``; print the checkpoint. Returns the exit code."""
    file, run_dir, *flags = argv
    try:
        content = read(Path(file), trust="--trust" in flags)
        _make(Path(run_dir))
        print(write_checkpoint(Store(), Path(run_dir), snapshot_of(content, file)))
    except LoopkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"{run_dir} cannot be made: {error.strerror}") from error


def read(file: Path, *, trust: bool) -> Any:
    """Return what ``torch.save`` wrote into a file.

    Raises:
        CheckpointError: it needs ``--trust``, or is no such file.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=not trust)
    except Exception as error:
        problem = str(error).strip().partition("\n")[0]
        if trust:
            raise CheckpointError(f"{file} cannot be read: {problem}") from error
        raise CheckpointError(
            f"{file} cannot be read as tensors and plain values alone. Reading the rest runs code that "
            "the file names: if you trust its author, pass --trust"
        ) from error


def snapshot_of(content: Any, file: str) -> Snapshot:
    """Return a checkpoint of weights alone, from a ``state_dict`` or a dict that holds one.

    Raises:
        CheckpointError: there are no weights.
    """
    weights = content
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        weights = content["state_dict"]
    if not isinstance(weights, Mapping) or not any(map(torch.is_tensor, weights.values())):
        raise CheckpointError(f"{file} holds no state_dict: a {type(content).__name__}")
    outer: Mapping[str, Any] = content if weights is not content else {}
    tensors = {
        str(name): value.detach() for name, value in weights.items() if torch.is_tensor(value)
    }
    step, epoch = int(outer.get("global_step", 0)), int(outer.get("epoch", 0))
    meta = {
        "kind": "weights",
        "step": step,
        "epoch": epoch,
        "samples": 0,
        "strategy": "import",
        "world_size": 1,
        "precision": "fp32",
        "versions": {"loopkit": __version__, "torch": str(torch.__version__)},
        "metrics": {},
    }
    state = {
        "task": {"class": Path(file).stem, "hparams": {}, "unsaved": []},
        "progress": {"epoch": epoch, "step": step},
        "extra_state": {},
        "hyper_parameters": _plain(outer.get("hyper_parameters") or {}),
    }
    return Snapshot({"model": tensors}, state, meta)


def _plain(given: Any) -> dict[str, Any]:
    """Return the hyperparameters that a checkpoint can hold."""
    kept = {}
    for name, value in dict(given).items():
        try:
            encode(value, name, {})
        except (TypeError, ValueError):
            continue
        kept[str(name)] = value
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

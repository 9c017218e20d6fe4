"""Trace: everything that a short run of a copy of a task leaves behind, to compare with another."""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopkit.checkpoint.codecs import encode
from loopkit.checkpoint.snapshot import Shard
from loopkit.errors import LoopkitWarning, OptionError
from loopkit.events import Hook
from loopkit.fit.fit import Fit
from loopkit.fit.state import run_state
from loopkit.run import Run
from loopkit.task import Task

TIMES = r"runtime|per_second|seconds|clocks|utilization|memory|mfu"
"""What is measured in time or memory, by a part of its name: it differs from run to run."""

_BYTES = torch.uint8
_OTHER_RUN = ("options", "seed", "task")


@dataclass
class Trace:
    """What a run leaves behind, in plain values.

    Attributes:
        state: the digest of each tensor and the text of each value that a checkpoint would hold.
        losses: the loss of each step as a hex float, by the step's number.
        rows: the rows of the log, without times.
        step: the last step.
    """

    state: dict[str, str] = field(default_factory=dict)
    losses: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0

    def differences(self, other: Trace) -> list[str]:
        """Return in words where two traces differ; empty if they are the same."""
        names = sorted(self.state.keys() | other.state.keys())
        found = [name for name in names if self.state.get(name) != other.state.get(name)]
        steps = sorted(self.losses.keys() | other.losses.keys(), key=int)
        found += [
            f"the loss of step {step}"
            for step in steps
            if self.losses.get(step) != other.losses.get(step)
        ]
        if self.rows != other.rows:
            row = next(
                (n for n, pair in enumerate(zip(self.rows, other.rows)) if pair[0] != pair[1]),
                min(len(self.rows), len(other.rows)),
            )
            found.append(f"row {row + 1} of the log, of {len(self.rows)} and {len(other.rows)}")
        return found


class Notes(Hook):
    """Notes the losses of a run, and its whole state at the end."""

    may_request = False

    def __init__(self, ignore: str) -> None:
        self.ignore = re.compile(f"{TIMES}|{ignore}" if ignore else TIMES)
        self.trace = Trace()

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Note the loss."""
        if isinstance(out, Mapping) and "loss" in out:
            self.trace.losses[str(run.progress.step)] = float(out["loss"]).hex()

    def on_fit_end(self, run: Run) -> None:
        """Note the state."""
        self.trace.step = run.progress.step
        self.trace.state = fingerprint(run, self.ignore)
        self.trace.rows = [
            {name: value for name, value in row.items() if not self.ignore.search(name)}
            for row in run.history
        ]


def require(holds: bool, text: str) -> None:
    """Raise an AssertionError, also where Python leaves ``assert`` out."""
    if not holds:
        raise AssertionError(text)


def fingerprint(run: Run, ignore: re.Pattern[str]) -> dict[str, str]:
    """Return what a checkpoint of this moment would hold, by name: digests and short texts.

    Args:
        run: the run, between two steps. Every rank calls this; each gets its own shards.
        ignore: names to leave out.
    """
    snapshot = run_state(run)
    state = {name: value for name, value in snapshot.state.items() if name not in _OTHER_RUN}
    tensors: dict[str, Any] = {}
    plain = dict(_leaves(encode(state, "", tensors), ""))
    named = {
        f"{prefix}.{name}": tensor
        for prefix, each in {**snapshot.tensors, "state": tensors}.items()
        for name, tensor in each.items()
    }
    found = plain | {name: _digest(tensor) for name, tensor in named.items()}
    return {name: value for name, value in found.items() if not ignore.search(name)}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and len(value) <= 32:
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    else:
        text = repr(value)
        yield path, text if len(text) < 80 else hashlib.sha256(text.encode()).hexdigest()


def _digest(value: Tensor | Shard) -> str:
    tensor = value.tensor if isinstance(value, Shard) else value
    if tensor is None:
        return "on another rank"
    data = tensor.detach().cpu().contiguous().reshape(-1).view(dtype=_BYTES).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def train(
    task: Task, fit: Fit, run_dir: Path, *hooks: Hook, ignore: str = "", **changes: Any
) -> Trace:
    """Train a copy of ``task``, from the newest checkpoint in ``run_dir`` if there is one.

    Args:
        task: the task.
        fit: the options. Hooks are copied; functions that ``Fit.on`` subscribed are shared.
        run_dir: where the run goes.
        hooks: further hooks, which are not copied.
        ignore: a regular expression of names of values that may differ.
        changes: options to change.
    """
    try:
        task, own = copy.deepcopy((task, list(fit.options.hooks)))
    except Exception as error:
        raise OptionError(
            f"the checks train copies of the task and the hooks, and they cannot be copied: "
            f"{type(error).__name__}: {error}"
        ) from error
    notes = Notes(ignore)
    options = {"progress": False, "loggers": ("jsonl",), "resume": "auto", **changes}
    changed = fit.with_options(run_dir=run_dir, hooks=[*own, *hooks, notes], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopkitWarning)
        changed.run(task)
    return notes.trace

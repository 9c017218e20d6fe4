"""Saving and resuming a run: all its state as one Snapshot, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loopkit import __version__, rng
from loopkit.checkpoint import BackgroundWriter, Snapshot, Store, apply, clean, scan, write
from loopkit.checkpoint.codecs import encode
from loopkit.errors import CheckpointError, LoopkitError
from loopkit.events import Hook
from loopkit.optim.averaging import evaluation_weights
from loopkit.options import Checkpoint
from loopkit.run import Run
from loopkit.strategies.base import Strategy


def capture(run: Run, *, weights_only: bool = False) -> Snapshot:
    """Everything a resume needs, as of this moment. Tensors are the live ones: copy or write before going on."""
    progress, task = run.progress, run.task
    hparams, unsaved = _plain_hparams(task.hparams)
    measured = run.measured_at == progress.step
    meta = {
        "kind": "weights" if weights_only else "full",
        "step": progress.step,
        "epoch": progress.epoch,
        "samples": progress.samples,
        "strategy": type(run.strategy).__name__,
        "world_size": run.strategy.world_size,
        "precision": run.strategy.numerics.precision.name,
        "versions": {"loopkit": __version__, "torch": str(torch.__version__)},
        "metrics": {name: value for name, value in run.metrics.items() if name.startswith("eval/")} if measured else {},
    }
    about = {"class": type(task).__name__, "hparams": hparams, "unsaved": unsaved}
    state: dict[str, Any] = {"task": about, "progress": progress.state_dict()}
    with evaluation_weights(run.optimizers.values()) as training:
        model = run.strategy.model_state()
        tensors = {"model": {name: tensor.clone() for name, tensor in model.items()} if training else model}
    if not weights_only:
        tensors["optimizer"], state["optimizers"] = optimizer_state(run.strategy, task)
        state |= {
            "options": run.options.to_dict(),
            "seed": {"seed": run.options.seed, "data_seed": run.options.data_seed, "rng": run.options.rng},
            "data": run.data_state,
            "running": run.running.state_dict(),
            "schedules": {name: schedule.state_dict() for name, schedule in run.schedules.items()},
            "scaler": run.strategy.scaler_state(),
            "hooks": {key: hook.state_dict() for key, hook in _keyed(run.hooks).items()},
            "agenda": run.agenda.state_dict(),
            "metrics": run.metrics,
            "best": run.best,
            "streams": rng.capture(run.strategy.device),
            "training_weights": {n: training[id(p)] for n, p in task.named_parameters() if id(p) in training},
        }
    return Snapshot(tensors, state, meta)


def restore(run: Run, snapshot: Snapshot, path: Path) -> None:
    """Put a verified snapshot back into a run that is built like the one it was taken from.

    Everything is compared before anything changes.

    Raises:
        CheckpointError: the model, the optimizers or the hooks are not the ones that were saved.
    """
    state, meta = snapshot.state, snapshot.meta
    if meta.get("kind") != "full":
        raise CheckpointError(f"{path} holds weights alone and cannot be resumed: train on from it with "
                              f"{type(run.task).__name__}.load({str(path)!r})")  # fmt: skip
    check_model(run.strategy.model_state(), snapshot.tensors.get("model", {}), path)
    loads = [
        (optimizer, _optimizer_input(run, name, optimizer, snapshot, path))
        for name, optimizer in run.optimizers.items()
    ]
    keyed = _keyed(run.hooks)
    run.strategy.load_model_state(snapshot.tensors["model"])
    for optimizer, saved in loads:
        optimizer.load_state_dict(saved)
    with torch.no_grad():
        for name, weight in state.get("training_weights", {}).items():
            run.task.get_parameter(name).copy_(weight)
    run.progress.load_state_dict(state["progress"])
    run.data_state = state["data"]
    if run.feed is not None and hasattr(run.feed.source, "load_state"):
        run.feed.source.load_state(state["data"])
    run.running.load_state_dict(state["running"])
    for name, schedule in run.schedules.items():
        if name in state["schedules"]:
            schedule.load_state_dict(state["schedules"][name])
    run.strategy.load_scaler_state(state["scaler"])
    for key, hook in keyed.items():
        if key in state["hooks"]:
            hook.load_state_dict(state["hooks"][key])
    run.agenda.load_state_dict(state["agenda"])
    run.metrics, run.best = dict(state["metrics"]), dict(state["best"])
    rng.restore(state["streams"], run.strategy.device)


def check_model(have: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that are not those of the task: other names, shapes or dtypes.

    Raises:
        CheckpointError: with the differences.
    """
    wrong = [f"{name} is missing in the checkpoint" for name in have if name not in saved]
    wrong += [f"{name} is not in the task" for name in saved if name not in have]
    for name in have.keys() & saved.keys():
        mine, theirs = have[name], saved[name]
        if mine.shape != theirs.shape:
            wrong.append(f"{name} has shape {tuple(theirs.shape)}, the task's has {tuple(mine.shape)}")
    if wrong:
        shown = "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        raise CheckpointError(f"{path} does not fit the task: {shown}")


def optimizer_state(strategy: Strategy, task: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizers' tensors by "<parameter>/<state>" and the rest as plain values.

    With several optimizers the first part is preceded by the optimizer's name.
    """
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, optimizer in strategy.optimizers.items():
        prefix = f"{name}/" if len(strategy.optimizers) > 1 else ""
        values: dict[str, Any] = {}
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                full = f"{names[id(parameter)]}/{key}"
                if isinstance(value, Tensor):
                    tensors[prefix + full] = value
                else:
                    values[full] = value
        groups = [
            {k: v for k, v in group.items() if k != "params"} | {"params": [names[id(p)] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        plain[name] = {"class": type(optimizer).__name__, "groups": groups, "values": values}
    return tensors, plain


def _optimizer_input(run: Run, name: str, optimizer: Optimizer, snapshot: Snapshot, path: Path) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, matched by parameter name, so that order does not matter."""
    saved = snapshot.state["optimizers"].get(name)
    if saved is None:
        have = ", ".join(snapshot.state["optimizers"])
        raise CheckpointError(f"{path} has no optimizer {name!r}: it has {have}")
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(f"{path} was saved with {saved['class']} as optimizer {name!r}, and the task now makes "
                              f"{type(optimizer).__name__}")  # fmt: skip
    names = {id(parameter): n for n, parameter in run.task.named_parameters()}
    numbers = {names[id(p)]: i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    by_names = {frozenset(group["params"]): group for group in saved["groups"]}
    groups, count = [], 0
    for group in optimizer.param_groups:
        held = [names[id(p)] for p in group["params"]]
        match = by_names.get(frozenset(held))
        if match is None:
            raise CheckpointError(f"{path}: optimizer {name!r} has other parameter groups: none of the saved ones "
                                  f"holds just {', '.join(held[:4])}{' …' if len(held) > 4 else ''}")  # fmt: skip
        groups.append(match | {"params": list(range(count, count + len(held)))})
        count += len(held)
    state: dict[int, dict[str, Any]] = {}
    prefix = f"{name}/" if len(run.optimizers) > 1 else ""
    for source in (snapshot.tensors.get("optimizer", {}), {prefix + k: v for k, v in saved["values"].items()}):
        for full, value in source.items():
            if full.startswith(prefix):
                parameter, _, key = full[len(prefix) :].rpartition("/")
                if parameter in numbers:
                    state.setdefault(numbers[parameter], {})[key] = value
    return {"state": state, "param_groups": groups}


def _plain_hparams(hparams: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The constructor arguments that can be saved as values, and the names of those that cannot."""
    saved, lost = {}, []
    for name, value in hparams.items():
        tensors: dict[str, Tensor] = {}
        try:
            encode(value, f"hparams.{name}", tensors)
        except (TypeError, LoopkitError):
            lost.append(name)
            continue
        saved[name] = value
    return saved, lost


def _keyed(hooks: list[Hook]) -> dict[str, Hook]:
    """Hooks that keep state by class name and occurrence: ``"EMA"``, ``"EMA-2"``."""
    keyed: dict[str, Hook] = {}
    for hook in hooks:
        name = type(hook).__name__
        count = sum(1 for other in keyed.values() if type(other).__name__ == name) + 1
        keyed[name if count == 1 else f"{name}-{count}"] = hook
    return keyed


class Saver:
    """Saves a run's state where it is asked to, in the background or at once, and keeps what is to be kept."""

    def __init__(self, settings: Checkpoint, run_dir: Path, store: Store) -> None:
        self.settings = settings
        self.run_dir = run_dir
        self.store = store
        self.newest: Path | None = None
        self._trusted: set[Path] = set()
        self._saved_step = -1
        self._writer = BackgroundWriter(store, run_dir, self._retain)
        clean(store, run_dir)

    def save(self, run: Run) -> None:
        """Save the state of this moment, unless it is saved already.

        Raises:
            DiskFullError: an earlier save or this one did not fit; what was saved before is intact.
        """
        if self._saved_step == run.progress.step and not run.agenda.asked("eval"):
            return
        snapshot = capture(run, weights_only=self.settings.weights_only)
        if self.settings.background:
            self._writer.submit(snapshot)
        else:
            path = write(self.store, self.run_dir, snapshot)
            self._retain(path)
            self._report(run, [path])
        self._saved_step = run.progress.step

    def poll(self, run: Run) -> None:
        """Tell the hooks what a background save has finished; raises its failure."""
        self._report(run, self._writer.poll())

    def finish(self, run: Run) -> None:
        """Wait for the save in flight."""
        self._report(run, self._writer.close())

    def best(self, run: Run) -> Path | None:
        """The checkpoint of the best evaluation; None when there was none, or it is gone."""
        steps = [e.path for e in scan(self.store, self.run_dir) if e.step == run.best.get("step") and not e.problem]
        return steps[-1] if steps else None

    def resumed(self, path: Path, step: int) -> None:
        """The run goes on from ``path``, which is known to be good."""
        self._trusted.add(path)
        self.newest, self._saved_step = path, step

    def _report(self, run: Run, paths: list[Path]) -> None:
        for path in paths:
            self.newest = path
            if run.events.save is not None:
                run.events.save(run, path)

    def _retain(self, path: Path) -> None:
        self._trusted.add(path)
        settings = self.settings
        apply(self.store, self.run_dir, settings.keep, settings.keep_best, settings.metric(), self._trusted)

"""The state of a run as one Snapshot, and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopkit import rng
from loopkit.checkpoint import Snapshot
from loopkit.checkpoint.codecs import encode
from loopkit.checkpoint.format import MANIFEST, STATE
from loopkit.checkpoint.safetensors_io import check_tensor
from loopkit.checkpoint.schema import NEEDED_TO_RESUME, check_like, check_state, reading
from loopkit.errors import CheckpointError, LoopkitError, LoopkitWarning
from loopkit.events import Events
from loopkit.fit.length import update_length
from loopkit.hooks.state_keys import state_keys
from loopkit.hooks.states import hook_states, own_states
from loopkit.metrics.accumulator import MetricAccumulator
from loopkit.metrics.kept import kept_state, load_kept_state, preserved_metrics
from loopkit.module_state import (
    differences,
    extra_state,
    load_extra_state,
    make_room,
    tensors_of,
)
from loopkit.monitor import is_of_evaluation
from loopkit.optim.schedule_free import evaluation_weights
from loopkit.run import Progress, Record, Run
from loopkit.sharded import local_tensor
from loopkit.strategies import dtensor
from loopkit.task import name_of
from loopkit.task_changes import describe_lost
from loopkit.version import __version__


def run_state(run: Run, *, weights_only: bool = False) -> Snapshot:
    """Return everything that a resume on any number of ranks needs. Every rank calls it.

    The tensors are the live ones: copy or write them before the next step.

    Args:
        run: the run, between two steps.
        weights_only: only parameters and buffers, which cannot be resumed from.
    """
    progress, task = run.progress, run.task
    world, data = run.strategy.world, run.committed.data
    hparams, unsaved = _plain_hparams(task.hparams)
    meta = {
        "kind": "weights" if weights_only else "full",
        "step": progress.step,
        "epoch": progress.epoch,
        "samples": progress.samples,
        "strategy": run.strategy.name,
        "world_size": run.strategy.world_size,
        "precision": run.strategy.settings.precision.name,
        "versions": {"loopkit": __version__, "torch": str(torch.__version__)},
        "metrics": _metrics_of_step(run),
    }
    about = {"class": name_of(task), "hparams": hparams, "unsaved": unsaved}
    state: dict[str, Any] = {
        "task": about,
        "progress": progress.state_dict(),
        "extra_state": extra_state(task),
        "new_buffers": run.at_start.new_buffers(task),
    }
    with evaluation_weights(run.optimizers.values()) as training:
        model = run.strategy.model_state()
        tensors = {
            "model": {name: tensor.clone() for name, tensor in model.items()} if training else model
        }
    if not weights_only:
        tensors["optimizer"], state["optimizers"] = run.strategy.optimizer_state()
        state |= {
            "requires_grad": run.at_start.changed_requires_grad(
                # A hook that freezes by the step alone does so again.
                task,
                {n for h in run.hooks for n in getattr(h, "frozen", ())},
            ),
            "unsaved_attributes": run.at_start.changed_attributes(task),
            "options": run.options.to_dict(),
            "seed": {
                "seed": run.options.seed,
                "data_seed": run.options.data_seed,
                "rng": run.options.rng,
            },
            "data": world.all_gather_object(data) if _is_uneven(run) else data,
            "measured": None if run.loader is None else run.loader.measured,
            "kept_metrics": kept_state(task, run.strategy.dp.all_gather_object),
            "accumulator": run.accumulator.state_dict(run.strategy.dp.all_gather_object),
            "schedules": {name: schedule.state_dict() for name, schedule in run.schedules.items()},
            "scaler": run.strategy.scaler.state_dict() if run.strategy.scaler else {},
            **hook_states(run.hooks, world),
            "triggers": run.triggers.state_dict(),
            "metrics": run.record.metrics,
            "best": run.record.best,
            "loops": run.loops.state_dict(),
            "rng": _rng_state(run),
            "training_weights": {
                n: training[id(p)] for n, p in task.named_parameters() if id(p) in training
            },
        }
    return Snapshot(
        dtensor.local_shards(tensors),
        dtensor.local_shards(state),
        meta,
        dict(task.checkpoint_files()),
        run.loggers.files(),
    )


def _metrics_of_step(run: Run) -> dict[str, float]:
    """Return the evaluation's metrics, and the value that decides about the best, of this step."""
    monitor, logged_at = run.options.monitor(), run.record.logged_at
    return {
        name: value
        for name, value in run.metrics.items()
        if logged_at.get(name) == run.progress.step
        and (is_of_evaluation(name) or (monitor is not None and name == monitor.name))
    }


def load_run_state(run: Run, snapshot: Snapshot, path: Path) -> None:
    """Load a verified snapshot into a run that is set up like the one that saved it.

    All parts are compared before the first one is changed.

    Raises:
        CheckpointError: the model, the optimizers or the hooks are not the ones that were saved.
    """
    state, meta = snapshot.state, snapshot.meta
    if meta.get("kind") != "full":
        raise CheckpointError(
            f"{path} holds weights alone and cannot be resumed: train on from it with "
            f"{name_of(run.task)}.load({str(path)!r})"
        )
    check_state(state, path, NEEDED_TO_RESUME)
    if state["progress"]["step"] != meta["step"]:
        raise CheckpointError(
            f"{path / STATE}: progress.step is {state['progress']['step']}, and {MANIFEST} says "
            f"{meta['step']}"
        )
    of_hooks = own_states(run.hooks, state, run.strategy.world, path)
    load_model = prepare_model_load(run, snapshot, path)
    with reading(path, "optimizers"):
        load = run.strategy.load_optimizer_state(
            snapshot.tensors.get("optimizer", {}), state["optimizers"], path
        )
    load_model()
    with reading(path, "optimizers"):
        load()
    with reading(path, "training_weights"):
        for name, weight in state.get("training_weights", {}).items():
            dtensor.copy_into(run.task.get_parameter(name), weight)
    with reading(path, "requires_grad"):
        for name, needed in state.get("requires_grad", {}).items():
            run.task.get_parameter(name).requires_grad_(needed)
    _name_lost_attributes(run, state)
    dp = run.strategy.dp
    with reading(path, "kept_metrics"):
        load_kept_state(run.task, state.get("kept_metrics", {}), dp.rank, dp.size, path)
    run.progress.load_state_dict(state["progress"])
    _load_data_state(run, state, path)
    # The saved values are those of all ranks together: rank 0 continues with them.
    run.accumulator.load_state_dict(state["accumulator"] if run.strategy.rank == 0 else {})
    for name, schedule in run.schedules.items():
        if name in state["schedules"]:
            with reading(path, f"schedules.{name}"):
                saved = state["schedules"][name]
                check_like(saved, schedule.state_dict(), f"schedules.{name}")
                schedule.load_state_dict(saved)
    if run.strategy.scaler is not None and state["scaler"]:
        with reading(path, "scaler"):
            run.strategy.scaler.load_state_dict(dict(state["scaler"]))
    for key, hook in state_keys(run.hooks).items():
        if key in of_hooks:
            with reading(path, f"hooks.{key}"):
                if type(hook).__module__.startswith("loopkit."):
                    check_like(of_hooks[key], hook.state_dict(), f"hooks.{key}")
                hook.load_state_dict(of_hooks[key])
    run.triggers.load_state_dict(state["triggers"])
    with reading(path, "loops"):
        run.loops.load_state_dict(state["loops"])
    run.record.metrics = dict(state["metrics"])
    run.record.best = dict(state["best"])
    with reading(path, "rng"):
        _load_rng_state(run, state["rng"])


def _load_data_state(run: Run, state: Mapping[str, Any], path: Path) -> None:
    if run.loader is not None:
        measured = state.get("measured")
        run.loader.measured = None if measured is None else (measured[0], measured[1])
        update_length(run)
    data = state["data"]
    by_rank = _is_uneven(run) or isinstance(data, list)
    run.committed.data = _own_part(run, data, path) if by_rank else data
    if run.loader is not None and hasattr(run.train_loader.source, "load_state"):
        with reading(path, "data"):
            run.train_loader.source.load_state(run.committed.data)


@contextmanager
def preserved(run: Run) -> Iterator[Run]:
    """Inside, a trial run shares the task and the strategy of ``run``; its steps are undone after.

    The trial run has no listeners and no schedules, and counts from 0. Weights, optimizers, the
    loss scaler, kept metrics, the data's own state and all random states are as before afterwards.
    """
    strategy = run.strategy
    parts = run.train_loader.source.stateful_parts()
    data = [copy.deepcopy(part.state_dict()) for part in parts]
    weights = {name: tensor.detach().clone() for name, tensor in strategy.model_state().items()}
    optimizers = {name: copy.deepcopy(o.state_dict()) for name, o in run.optimizers.items()}
    scaler = strategy.scaler.state_dict() if strategy.scaler is not None else {}
    rng_state = rng.get_state(strategy.device)
    try:
        with preserved_metrics(run.task):
            yield replace(
                run,
                events=Events(),
                accumulator=MetricAccumulator(),
                schedules={},
                progress=Progress(),
                record=Record(),
            )
    finally:
        strategy.pop_nonfinite_steps()
        strategy.load_model_state(weights)
        for name, optimizer in run.optimizers.items():
            optimizer.load_state_dict(optimizers[name])
            optimizer.zero_grad(set_to_none=True)
        if strategy.scaler is not None:
            strategy.scaler.load_state_dict(scaler)
        for part, saved in zip(parts, data):
            part.load_state_dict(saved)
        rng.set_state(rng_state, strategy.device)


def _is_uneven(run: Run) -> bool:
    return run.loader is not None and run.loader.source.uneven


def _own_part(run: Run, saved: Any, path: Path) -> Any:
    world = run.strategy.world
    if isinstance(saved, list) and all(part is None for part in saved):
        return None
    if not isinstance(saved, list) or len(saved) != world.size:
        count = len(saved) if isinstance(saved, list) else 1
        raise CheckpointError(
            f"{path} was saved by {count} ranks with data of their own (Loader(sharded=True)), "
            f"which {world.size} cannot resume: start as many ranks as before"
        )
    return saved[world.rank]


def _name_lost_attributes(run: Run, state: Mapping[str, Any]) -> None:
    run.at_start.lost = lost = state.get("unsaved_attributes", ())
    if lost:
        warnings.warn(describe_lost(name_of(run.task), lost), LoopkitWarning, stacklevel=3)


def _rng_state(run: Run) -> Any:
    """Return torch's random state; under ``rng="stream"``, a list with that of every rank."""
    state = run.committed.rng_state or rng.get_state(run.strategy.device)
    world = run.strategy.world
    return world.all_gather_object(state) if run.seed is None and world.size > 1 else state


def _load_rng_state(run: Run, saved: Any) -> None:
    strategy = run.strategy
    each = saved if isinstance(saved, list) else [saved]
    if run.seed is None and len(each) != strategy.world_size:
        warnings.warn(
            f"{len(each)} ranks saved their random state and {strategy.world_size} resume: under "
            "rng='stream' the run continues with other random numbers. rng='counter' continues "
            "with the same ones on any number of ranks",
            LoopkitWarning,
            stacklevel=2,
        )
        rng.seed_all(
            rng.mix(run.options.seed, run.progress.step, strategy.dp.rank), strategy.device
        )
    else:
        rng.set_state(each[strategy.rank if run.seed is None else 0], strategy.device)


def prepare_model_load(run: Run, snapshot: Snapshot, path: Path) -> Callable[[], None]:
    """Return a function that loads the model of a snapshot: parameters, buffers, extra state.

    Raises:
        CheckpointError: names or shapes differ, or the task refuses the checkpoint's files.
    """
    check_state(snapshot.state, path)
    run.task.check_files(snapshot.files, path)
    saved = snapshot.tensors.get("model", {})
    new_buffers = snapshot.state.get("new_buffers", ())
    wrong = differences(run.task, run.strategy.model_state(), saved, new_buffers)
    if wrong:
        raise CheckpointError(f"{path} does not fit the task: {wrong}")

    def load() -> None:
        make_room(run.task, saved, new_buffers)
        run.strategy.load_model_state(saved)
        with reading(path, "extra_state"):
            load_extra_state(run.task, snapshot.state.get("extra_state", {}), path)

    return load


def check_saveable(run: Run) -> None:
    """Refuse state that a checkpoint cannot hold, before the first step.

    Raises:
        CheckpointError: naming the tensor, or the module or hook that keeps the state.
    """
    kept = {f"{name} (get_extra_state)": value for name, value in extra_state(run.task).items()}
    kept |= {f"{key}.state_dict()": h.state_dict() for key, h in state_keys(run.hooks).items()}
    try:
        for name, tensor in tensors_of(run.task.state_dict()).items():
            check_tensor(name, local_tensor(tensor))
        for name, value in kept.items():
            found: dict[str, Tensor] = {}
            encode(dtensor.local_shards(value), name, found)
            for path, tensor in found.items():
                check_tensor(path, tensor)
    except TypeError as error:
        raise CheckpointError(
            f"this run cannot be saved: {error}. Convert the value, register the buffer with "
            "persistent=False, or pass checkpoint=False"
        ) from error


def _plain_hparams(hparams: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the constructor arguments that can be saved, and the names of the others."""
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

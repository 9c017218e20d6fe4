"""Opening a run: options and a task become the objects of a Run, in the order they depend on each
other.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from loopkit import rng
from loopkit.data.loader import IndexedSource
from loopkit.data.micro_batches import DataConfig, MicroBatchLoader, Source, open_source
from loopkit.data.prefetch import prefetch_to
from loopkit.durations import Cadence, Duration, RunLength, Start
from loopkit.errors import DataError, LoopkitWarning, OptionError, RunDirError, TaskError
from loopkit.events import Events, Hook, listens
from loopkit.fit.strategy_setup import build_strategy
from loopkit.hooks import numerics
from loopkit.loops import AutoMicroBatchStep, EpochLoop, EvalLoop, PredictLoop, StepLoop
from loopkit.optim.specs import build_optimizers
from loopkit.options import Options
from loopkit.run import Loops, Run
from loopkit.strategies.base import ComputeSettings, Strategy
from loopkit.strategies.compile import Compile
from loopkit.strategies.precision import matmul_precision, parse_precision
from loopkit.task import Task, name_of, overrides
from loopkit.triggers import Triggers

LOOPS = {"step": StepLoop, "epoch": EpochLoop, "eval": EvalLoop, "predict": PredictLoop}


def open_strategy(options: Options, task: Task) -> Strategy:
    """Open the strategy and place the task."""
    if not isinstance(task, Task):
        if isinstance(task, type):
            raise TaskError(
                f"Fit got {task!r}, which is not a Task; give an instance, {task.__name__}()"
            )
        raise TaskError(
            f"Fit got a {type(task).__name__}, which is not a Task: derive its class from "
            f"loopkit.Task"
        )
    strategy = build_strategy(options)
    how = (
        options.compile
        if isinstance(options.compile, Compile)
        else Compile()
        if options.compile
        else None
    )
    precision = parse_precision(options.precision)
    clip = (options.clip_norm, options.clip_value)
    strategy.setup_environment(
        ComputeSettings(
            precision,
            *clip,
            options.on_nan,
            how,
            options.activation_checkpointing,
            options.batch_size,
            options.accumulate,
            options.global_batch_size,
        )
    )
    rng.seed_all(options.seed, strategy.device)
    if not getattr(task, "_configured", False):
        with strategy.init_context():
            task.configure_model()
        task.__dict__["_configured"] = True
    strategy.setup_module(task)
    if options.rng == "stream" and strategy.dp.rank:  # or all ranks would drop out the same units
        rng.seed_all(rng.mix(options.seed, strategy.dp.rank), strategy.device)
    return strategy


@contextmanager
def torch_settings(options: Options) -> Iterator[None]:
    """Inside, torch computes as ``deterministic`` and ``precision`` say; afterwards as before."""
    with determinism(options.deterministic), matmul_precision(parse_precision(options.precision)):
        yield


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, torch uses deterministic algorithms and raises where an operation has
    none.
    """
    before, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if wanted:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is deterministic only with it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wanted:
            torch.use_deterministic_algorithms(before, warn_only=warns)


def build_loops(options: Options, task: Task) -> Loops:
    """The four loops: those of the options, then the task's own, then the default ones.

    Raises:
        TaskError: the task names a loop for a place there is not.
    """
    own, kinds = task.loops(), dict(LOOPS)
    if options.micro_batch == "auto":
        if options.step is not None or "step" in own:
            raise OptionError(
                "micro_batch='auto' begins the default step anew where memory runs out, and "
                f"{name_of(task)} brings its own step: leave one of them out"
            )
        kinds["step"] = AutoMicroBatchStep
    unknown = [place for place in own if place not in LOOPS]
    if unknown:
        raise TaskError(
            f"{name_of(task)}.loops() names {unknown[0]!r}: the places are {', '.join(LOOPS)}"
        )
    return Loops(
        **{
            place: getattr(options, place) or own.get(place) or kind()
            for place, kind in kinds.items()
        }
    )


def reading(options: Options, strategy: Strategy, *, training: bool) -> DataConfig:
    """How the options have training or evaluation data read."""
    limit = options.overfit or (options.limit_train if training else options.limit_eval)
    return DataConfig(
        batch_size=options.batch_size
        if training
        else options.eval_batch_size or options.batch_size,
        shuffle=training and options.overfit is None,
        seed=options.seed if options.data_seed is None else options.data_seed,
        seeded=options.rng == "counter",
        limit=limit,
        rank=strategy.dp.rank,
        world=strategy.dp.size,
        teams=strategy.dp.size < strategy.world_size,
    )


def open_eval_sources(
    data: Any, options: Options, strategy: Strategy, what: str
) -> dict[str, Source]:
    """The sources of one evaluation set (named "") or of several, given as a dict by name."""
    if data is None:
        raise DataError(f"{what} returned nothing to evaluate on: define it, or give data=")
    named = data if isinstance(data, Mapping) else {"": data}
    how = reading(options, strategy, training=False)
    return {
        name: open_source(part, how, f"{what}[{name!r}]" if name else what)
        for name, part in named.items()
    }


def open_train_loader(task: Task, options: Options, strategy: Strategy) -> MicroBatchLoader:
    """The training data in groups for one optimizer step each.

    Raises:
        OptionError: ``global_batch_size`` is no multiple of what the devices take at once.
    """
    how = reading(options, strategy, training=True)
    source = open_source(task.train_data(), how, f"{name_of(task)}.train_data()")
    accumulate = options.accumulate
    if options.global_batch_size is not None:
        at_once = (
            source.stride()
            if isinstance(source, IndexedSource)
            else options.batch_size * strategy.dp.size
        )
        accumulate, rest = divmod(options.global_batch_size, at_once)
        if rest or not accumulate:
            raise OptionError(
                f"global_batch_size={options.global_batch_size} is not a multiple of the {at_once} "
                "samples that all devices take at once"
            )
    ahead = options.rng == "counter"  # reading ahead would draw from torch's streams out of turn
    return MicroBatchLoader(
        source,
        accumulate,
        prefetch_to(strategy.device, strategy.settings.precision.storage, ahead=ahead),
    )


def run_length(options: Options, train_loader: MicroBatchLoader) -> RunLength:
    """How long the run is.

    Raises:
        OptionError: nothing ends it.
    """
    per_epoch = train_loader.steps_per_epoch()
    epochs = options.epochs
    if epochs is None and options.steps is None and options.time is None:
        epochs = 1
    limits = [options.steps] if options.steps is not None else []
    if epochs is not None and per_epoch is not None:
        limits.append(math.ceil(epochs * per_epoch))
    if epochs is not None and per_epoch is None and epochs != int(epochs):
        raise OptionError(f"epochs={epochs} needs data with a length: give steps=")
    return RunLength(per_epoch, min(limits) if limits else None, epochs, options.seconds())


def build_triggers(options: Options, length: RunLength, *, joint: bool) -> Triggers:
    """What happens when; ``joint`` says that several ranks must agree."""
    every: dict[str, Any] = {
        "log": (options.log_every, "log_every"),
        "eval": (options.eval_every, "eval_every"),
    }
    saves = options.saves()
    if saves is not None:
        every["save"] = (saves.every, "Checkpoint(every=)")
    cadences = {
        name: Cadence(Duration.parse(value, option), length, option)
        for name, (value, option) in every.items()
    }
    if options.eval_after is not None:
        evaluations = cadences["eval"]
        evaluations.start = Start.parse(options.eval_after, "eval_after", length, evaluations.every)
    # Step 1 is always logged.
    return Triggers(cadences, length.steps, stop_seconds=length.seconds, joint=joint, first=["log"])


def open_evaluation(task: Task, options: Options, strategy: Strategy) -> dict[str, Source]:
    """The sources evaluated on during training; none where the task names none or evaluation is
    off.

    Raises:
        TaskError: there is data, and no ``eval_step``.
    """
    if options.eval_every == "never" and not options.eval_first:
        return {}
    data = (
        task.train_data() if options.overfit and overrides(task, "eval_step") else task.eval_data()
    )
    if data is None:
        return {}
    if not overrides(task, "eval_step"):
        raise TaskError(
            f"{name_of(task)} has eval_data and no eval_step: define eval_step(self, batch) -> "
            f"dict, "
            "or pass eval_every='never'"
        )
    return open_eval_sources(data, options, strategy, f"{name_of(task)}.eval_data()")


def build_training(task: Task, options: Options, listeners: Iterable[Hook]) -> Run:
    """A run that trains ``task``, built and placed, at step 0, with no directory yet."""
    strategy = open_strategy(options, task)
    train_loader = open_train_loader(task, options, strategy)
    length = run_length(options, train_loader)
    evaluation = open_evaluation(task, options, strategy)
    saves = options.saves()
    if saves is not None and saves.best is not None and not evaluation:
        raise OptionError(
            f"Checkpoint(best={saves.best!r}) waits for an evaluation, and this run has none: give "
            f"the "
            "task an eval_data and an eval_step, and leave eval_every on"
        )
    optimizers, schedules = build_optimizers(task, length)
    watched = [
        metric for metric in (getattr(s, "watches", None) for s in schedules.values()) if metric
    ]
    if watched and not evaluation:
        raise OptionError(
            f"a schedule watches {watched[0]!r} and nothing is evaluated: define eval_data and "
            "eval_step, and give eval_every= a cadence"
        )
    hooks = [
        *options.hooks,
        *([numerics.Numerics()] if options.debug == "numerics" else []),
        *listeners,
    ]
    if not strategy.exposes_gradients:
        refuse_gradient_listeners([task, *hooks], strategy)
    strategy.setup_optimizers(optimizers)
    task.train()
    if options.micro_batch == "auto" and strategy.world_size > 1:
        raise OptionError(
            "micro_batch='auto' is for one process: where one of several ranks runs out of memory, "
            "the "
            "others wait in the midst of the same step. Give batch_size, and global_batch_size for "
            "the "
            "same maths"
        )
    triggers = build_triggers(options, length, joint=strategy.world_size > 1)
    return Run(
        task=task,
        strategy=strategy,
        options=options,
        length=length,
        triggers=triggers,
        events=Events([task, *hooks]),
        loops=build_loops(options, task),
        hooks=hooks,
        train_loader=train_loader,
        evaluation=evaluation,
        optimizers=optimizers,
        schedules=schedules,
        seed=options.seed if options.rng == "counter" else None,
    )


def refuse_gradient_listeners(listeners: Iterable[Any], strategy: Strategy) -> None:
    """Refuse listeners that would be shown gradients where there are none to see.

    Raises:
        OptionError: with the listener.
    """
    for listener in listeners:
        if listens(listener, "before_update"):
            who = name_of(listener) if isinstance(listener, Task) else type(listener).__name__
            raise OptionError(
                f"{who} listens to on_before_update, and {type(strategy).__name__} keeps gradients "
                f"to "
                "itself, in flat parts over the ranks: leave it out, or take strategy='ddp' or "
                "'fsdp'"
            )


def build_inference(task: Task, options: Options, listeners: Iterable[Hook]) -> Run:
    """A run that only evaluates or predicts."""
    strategy = open_strategy(options, task)
    hooks = [*options.hooks, *listeners]
    return Run(
        task=task,
        strategy=strategy,
        options=options,
        length=RunLength(),
        triggers=Triggers({}),
        events=Events([task, *hooks]),
        loops=build_loops(options, task),
        hooks=hooks,
        seed=options.seed if options.rng == "counter" else None,
    )


def warn_of_batch_norm(run: Run) -> None:
    """Warn where accumulation cannot be exact: BatchNorm normalises each micro-batch by its own
    statistics.
    """
    if run.train_loader is None or run.train_loader.accumulate == 1:
        return
    found = [
        name for name, m in run.task.named_modules() if isinstance(m, _BatchNorm) and m.training
    ]
    if found:
        shown = found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        warnings.warn(
            f"{run.train_loader.accumulate} micro-batches make one step, and BatchNorm ({shown}) "
            f"normalises each by "
            "itself: the step is not that of one big batch. Take GroupNorm or LayerNorm instead, "
            "freeze it "
            "(.eval() in the task's train()), or accumulate less with larger batches",
            LoopkitWarning,
            stacklevel=2,
        )


def choose_run_dir(options: Options, task: Task) -> Path:
    """The directory of this run, made: the one given, or runs/<task>/<n>, the newest one when
    resuming "auto".

    Raises:
        RunDirError: it cannot be made.
    """
    try:
        if options.run_dir is not None:
            run_dir = Path(options.run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            return run_dir
        parent = Path("runs") / name_of(task).lower()
        parent.mkdir(parents=True, exist_ok=True)
        numbers = sorted(int(p.name) for p in parent.iterdir() if p.name.isdigit())
        if options.resume == "auto" and numbers:
            return parent / str(numbers[-1])
        number = numbers[-1] + 1 if numbers else 1
        while True:
            try:
                (parent / str(number)).mkdir()
                return parent / str(number)
            except FileExistsError:
                number += 1
    except OSError as error:
        raise RunDirError(
            f"the run directory {error.filename} cannot be made: {error.strerror}. "
            "Give another with run_dir="
        ) from error

"""Set-up of a run: options and a task become the objects of a Run."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from loopkit import rng
from loopkit.data.micro_batches import MicroBatchLoader
from loopkit.data.sources import DataConfig, Source, is_source, open_source
from loopkit.data.transfer import group_transfer_fn
from loopkit.distributed.process_group import check_alone
from loopkit.durations import RunLength
from loopkit.errors import DataError, LoopkitWarning, OptionError, TaskError
from loopkit.events import Events, Hook, listens, logging_to_accumulator
from loopkit.fit.agreement import check_start, check_training
from loopkit.fit.length import build_triggers, run_length
from loopkit.fit.strategy_setup import build_strategy
from loopkit.fit.task_checks import check_task
from loopkit.loops import AutoMicroBatchStep, EpochLoop, EvalLoop, PredictLoop, StepLoop
from loopkit.loops.closure import check_closures
from loopkit.loops.coordination import Coordinator, build_coordinator
from loopkit.loops.monitors import check_monitors
from loopkit.optim.builder import build_optimizers
from loopkit.options import Options
from loopkit.run import Loops, Run
from loopkit.strategies.base import ComputeSettings, Strategy
from loopkit.strategies.compile import Compile
from loopkit.strategies.precision import matmul_precision, parse_precision
from loopkit.task import Task, configure, name_of, overrides
from loopkit.task_changes import TaskAtStart
from loopkit.triggers import Triggers

logger = logging.getLogger(__name__)
LOOPS: dict[str, Any] = {
    "step": StepLoop,
    "epoch": EpochLoop,
    "eval": EvalLoop,
    "predict": PredictLoop,
}


def new_run(
    task: Task, options: Options, listeners: Sequence[Hook] = (), observers: Sequence[Hook] = ()
) -> Run:
    """Return a run in which nothing is opened yet.

    Args:
        task: the task.
        options: the options.
        listeners: hooks besides those of the options.
        observers: hooks that are called last, and of which a checkpoint knows nothing.

    Raises:
        TaskError: ``task`` is not a Task, or is written for another library.
        OptionError: the options name no strategy, or a hook listens to an unknown event.
    """
    if isinstance(task, type):
        raise TaskError(
            f"Fit got {task!r}, which is not a Task; give an instance, {task.__name__}()"
        )
    if not isinstance(task, Task):
        raise TaskError(
            f"Fit got a {type(task).__name__}, which is not a Task: derive its class from "
            "loopkit.Task"
        )
    check_task(task)
    task.log_collector.take_media()  # of an evaluation or prediction, which has no loggers
    hooks = [*options.hooks, *listeners]
    return Run(
        task=task,
        strategy=build_strategy(options),
        options=options,
        length=RunLength(),
        triggers=Triggers({}),
        coordinator=Coordinator(),
        events=Events([logging_to_accumulator(task), *hooks, *observers]),
        loops=build_loops(options, task),
        hooks=hooks,
        seed=options.seed if options.rng == "counter" else None,
    )


def open_strategy(run: Run, what: str = "evaluate or predict") -> None:
    """Set up the strategy's processes and device, and give it the task.

    Args:
        run: the run.
        what: what the run is to do, which all ranks must do alike.

    Raises:
        OptionError: the ranks were started differently.
    """
    task, options, strategy = run.task, run.options, run.strategy
    strategy.setup_environment(
        ComputeSettings(
            precision=parse_precision(options.precision),
            clip_norm=options.clip_norm,
            clip_value=options.clip_value,
            on_nan=options.on_nan,
            compile=Compile() if options.compile is True else options.compile or None,
            activation_checkpointing=options.activation_checkpointing,
            batch_size=options.batch_size,
            accumulate=options.accumulate,
            global_batch_size=options.global_batch_size,
        )
    )
    check_start(run, what)
    rng.seed_all(options.seed, strategy.device)
    with strategy.init_context():
        configure(task)
    strategy.setup_module(task)
    if options.rng == "stream" and strategy.dp.rank:
        # With one stream, dropout would drop the same units on all ranks.
        rng.seed_all(rng.mix(options.seed, strategy.dp.rank), strategy.device)
    logger.info("set up %s on %s: %s", name_of(task), strategy.device, strategy.name)


def prepare_training(run: Run) -> None:
    """Open everything that training needs: strategy, data, optimizers and triggers.

    Raises:
        OptionError: options that do not fit together, the task or the strategy.
        TaskError: the task lacks a method that training needs.
        DataError: there is no data to train on.
    """
    options, task = run.options, run.task
    open_strategy(run, "train")
    strategy = run.strategy
    if strategy.world_size == 1 and options.saves() is not None:
        check_alone(strategy.name)
    run.loader = open_train_loader(task, options, strategy)
    run.length = run_length(options, run.loader, run.progress)
    run.eval_data = open_eval_data(task, options, strategy)
    run.optimizers, run.schedules = build_optimizers(run)
    run.at_start = TaskAtStart.of(task)
    check_monitors(run)
    check_closures(run)
    check_training(run)
    if not strategy.exposes_gradients:
        refuse_gradient_listeners([task, *run.hooks], strategy)
    strategy.setup_optimizers(run.optimizers)
    put_in_train_mode(task)
    if options.micro_batch == "auto" and strategy.world_size > 1:
        raise OptionError(
            "micro_batch='auto' is for one process: where one of several ranks runs out of memory, "
            "the others wait in the middle of the same step. Give batch_size, and "
            "global_batch_size for the same maths"
        )
    run.triggers = build_triggers(options, run.length)
    run.coordinator = build_coordinator(strategy)


def put_in_train_mode(task: Task) -> None:
    """Put a task in train mode; a part that the user put in eval mode stays there.

    A task that is in eval mode as a whole, as after ``task.eval()``, is put in train mode as a
    whole. Parts that train without their dropout are reported, since ``from_pretrained`` of other
    libraries leaves models in eval mode.
    """
    # A task may override train() to keep a part in eval mode, so it is called in any case.
    kept = [part for part in task.modules() if not part.training] if task.training else []
    task.train()
    for part in kept:
        part.training = False
    idle = [
        name
        for name, module in task.named_modules()
        if not module.training
        and any(isinstance(m, _DropoutNd) and m.p > 0 for m in module.modules())
        and any(parameter.requires_grad for parameter in module.parameters())
    ]
    if idle:
        warnings.warn(
            f"{name_of(task)}.{idle[0]} is trained and in eval mode, so its dropout does nothing. "
            f"Call self.{idle[0]}.train() in __init__, or set its dropout to 0 if that is meant",
            LoopkitWarning,
            stacklevel=2,
        )


@contextmanager
def torch_settings(options: Options) -> Iterator[None]:
    """Inside, torch computes as ``deterministic`` and ``precision`` say; afterwards as before."""
    with determinism(options.deterministic), matmul_precision(parse_precision(options.precision)):
        yield


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, torch uses deterministic algorithms only, if ``wanted``.

    An operation that has none then raises torch's RuntimeError.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        # cuBLAS is deterministic only with this setting.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if wanted:
            torch.use_deterministic_algorithms(before, warn_only=warns)


def build_loops(options: Options, task: Task) -> Loops:
    """Return the four loops: each from the options, or else from the task, or else the default.

    Raises:
        TaskError: ``Task.loops`` has an unknown name.
        OptionError: ``micro_batch="auto"`` meets a custom step.
    """
    own, kinds = task.loops(), dict(LOOPS)
    if options.micro_batch == "auto":
        if options.step is not None or "step" in own:
            raise OptionError(
                "micro_batch='auto' repeats the default step where memory runs out, and "
                f"{name_of(task)} brings its own step: leave one of them out"
            )
        kinds["step"] = AutoMicroBatchStep
    unknown = [name for name in own if name not in LOOPS]
    if unknown:
        raise TaskError(
            f"{name_of(task)}.loops() names {unknown[0]!r}: the names are {', '.join(LOOPS)}"
        )
    loops = {name: getattr(options, name) or own.get(name) for name in LOOPS}
    return Loops(**{name: loop or kinds[name]() for name, loop in loops.items()})


def data_config(task: Task, options: Options, strategy: Strategy, *, training: bool) -> DataConfig:
    """Return how training data, or evaluation data, is read under these options."""
    limit = options.overfit or (options.limit_train if training else options.limit_eval)
    batch_size = options.batch_size
    if not training and options.eval_batch_size is not None:
        batch_size = options.eval_batch_size
    return DataConfig(
        batch_size=batch_size,
        shuffle=training and options.overfit is None,
        seed=options.seed if options.data_seed is None else options.data_seed,
        seeded=options.rng == "counter",
        limit=limit,
        rank=strategy.dp.rank,
        num_replicas=strategy.dp.size,
        tensor_parallel=strategy.dp.size < strategy.world_size,
        count_samples=getattr(task, "count_samples", None),
    )


def open_eval_sources(
    data: Any, task: Task, options: Options, strategy: Strategy, what: str
) -> dict[str, Source]:
    """Open one evaluation set, under the name "", or a dict or list of several.

    Those of a list are named by number, "0", "1" and so on.

    Raises:
        DataError: there is nothing to evaluate on.
    """
    if data is None:
        raise DataError(f"{what} returned nothing to evaluate on: define it, or give data=")
    named = data if isinstance(data, Mapping) else {"": data}
    if isinstance(data, (list, tuple)) and data and all(map(is_source, data)):
        named = {str(number): part for number, part in enumerate(data)}
    config = data_config(task, options, strategy, training=False)
    return {
        name: open_source(part, config, f"{what}[{name!r}]" if name else what)
        for name, part in named.items()
    }


def open_train_loader(task: Task, options: Options, strategy: Strategy) -> MicroBatchLoader:
    """Open the training data, grouped into the micro-batches of each optimizer step.

    Raises:
        OptionError: ``global_batch_size`` is not a multiple of one micro-batch on all ranks, or
            the size of a micro-batch is not known.
    """
    config = data_config(task, options, strategy, training=True)
    source = open_source(task.train_data(), config, f"{name_of(task)}.train_data()")
    accumulate = options.accumulate
    if options.global_batch_size is not None:
        at_once = source.samples_at_once()
        accumulate, rest = divmod(options.global_batch_size, at_once)
        if rest or not accumulate:
            raise OptionError(
                f"global_batch_size={options.global_batch_size} is not a multiple of the {at_once} "
                "samples that all devices take at once"
            )
    # Under rng="stream" a prefetch would draw random numbers before the present step does.
    prefetch = options.rng == "counter"
    to_device = group_transfer_fn(
        strategy.device, strategy.settings.precision.storage, prefetch=prefetch
    )
    return MicroBatchLoader(source, accumulate, to_device)


def open_eval_data(task: Task, options: Options, strategy: Strategy) -> dict[str, Source]:
    """Open the data that training evaluates on; nothing where there is none or it is off.

    Raises:
        TaskError: there is data, and no ``eval_step``.
    """
    if options.eval_every == "never" and not options.eval_first:
        return {}
    overfits = options.overfit and overrides(task, "eval_step")
    data = task.train_data() if overfits else task.eval_data()
    if data is None:
        return {}
    if not overrides(task, "eval_step"):
        raise TaskError(
            f"{name_of(task)} has eval_data and no eval_step: define "
            "eval_step(self, batch) -> dict, or pass eval_every='never'"
        )
    if overfits:
        data = {"": data}  # as it is read in training
    return open_eval_sources(data, task, options, strategy, f"{name_of(task)}.eval_data()")


def refuse_gradient_listeners(listeners: Iterable[Any], strategy: Strategy) -> None:
    """Refuse listeners of ``on_before_update`` under a strategy that exposes no gradients.

    Raises:
        OptionError: naming the listener.
    """
    for listener in listeners:
        if listens(listener, "before_update"):
            who = name_of(listener) if isinstance(listener, Task) else type(listener).__name__
            raise OptionError(
                f"{who} listens to on_before_update, and {type(strategy).__name__} keeps gradients "
                "to itself, in flat shards over the ranks: leave it out, or take strategy='ddp' or "
                "'fsdp'"
            )


def warn_of_batch_norm(run: Run) -> None:
    """Warn where accumulation is not exact: BatchNorm normalises each micro-batch by itself."""
    accumulate = run.train_loader.accumulate
    if accumulate == 1:
        return
    found = [
        name for name, m in run.task.named_modules() if isinstance(m, _BatchNorm) and m.training
    ]
    if found:
        shown = found[0] + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        warnings.warn(
            f"{accumulate} micro-batches make one step, and BatchNorm ({shown}) normalises each by "
            "itself: the step is not that of one big batch. Take GroupNorm or LayerNorm instead, "
            "freeze it (.eval() in the task's train()), or accumulate less with larger batches",
            LoopkitWarning,
            stacklevel=2,
        )

"""PlannedRun: a run of the real engine whose steps compute shapes alone, on ranks that are not there."""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import OptionError, TaskError
from loopkit.fit.setup import new_run, prepare_training, torch_settings
from loopkit.fit.strategy_setup import build_strategy
from loopkit.loops.step import StepLoop
from loopkit.options import Options
from loopkit.plan.absent_ranks import absent_ranks, send_real_objects
from loopkit.plan.fakes import fake_parameters, make_fake, resized
from loopkit.plan.timeline import HOST, KINDS, MemoryTimeline, Peak, tensors_in
from loopkit.run import Run
from loopkit.strategies.activation_checkpointing import parse_activation_checkpointing
from loopkit.strategies.base import Strategy
from loopkit.strategies.ddp import DDP
from loopkit.strategies.deepspeed.strategy import DeepSpeed
from loopkit.strategies.fsdp import FSDP
from loopkit.strategies.fsdp_groups import groups_of
from loopkit.task import Task, name_of

# Options that add nothing to a step, as they are while it is planned.
_OFF: dict[str, Any] = {
    "accelerator": "cpu", "checkpoint": False, "compile": False, "debug": None, "dry_run": False,
    "eval_after": None, "eval_every": "never", "eval_first": False, "hooks": (), "loggers": None,
    "micro_batch": None, "progress": False, "resume": None, "run_dir": None,
}  # fmt: skip
# The first micro-batch makes the gradients, the next adds to them, the last sends them.
_MICRO_BATCHES = 3
_READ = 4  # groups of the data, of which the largest is taken
MOST_SAMPLES = 1 << 20


class PlannedRun:
    """A prepared run whose steps can be measured at any size of the micro-batch.

    Attributes:
        run: the run, whose task has fake parameters.
        ranks: the number of ranks.
        batch_size: the samples of a micro-batch of the task's data.
        notes: what the run does and the plan leaves out, one sentence each.
    """

    def __init__(self, run: Run, mode: FakeTensorMode, ranks: int, notes: list[str]) -> None:
        self.run = run
        self.ranks = ranks
        self.notes = notes
        self._mode = mode
        strategy = run.strategy
        self._offloads = isinstance(strategy, FSDP) and strategy.offload
        self._timeline = MemoryTimeline(updates_on_host=self._offloads)
        self._batch, self.batch_size = _largest_batch(run)
        self._follow()

    def peak(self, batch_size: int | None = None) -> Peak:
        """Return the peak of a step on rank 0.

        Args:
            batch_size: samples of a micro-batch; None takes those of the data.

        Raises:
            TaskError: the step depends on values, and not on shapes alone.
        """
        size = batch_size or self.batch_size
        count = min(self.run.train_loader.accumulate, _MICRO_BATCHES)
        batches = [resized(self._mode, self._batch, self.batch_size, size) for _ in range(count)]
        group = MicroBatches(
            sizes=[size] * count,
            samples=size * count,
            total=size * count * self.run.strategy.dp.size,
        )
        group.extend(batches)
        try:
            with torch_settings(self.run.options), self._mode, self._timeline as timeline:
                timeline.note("activations", tensors_in(batches))
                del batches
                with timeline.step() as found:
                    self.run.loops.step.run(self.run, group)
                    self.run.strategy.finish_step()
        except (
            DataDependentOutputException,
            DynamicOutputShapeException,
            UnsupportedOperatorException,
        ) as error:
            raise _needs_values(self.run.task, error) from error
        return found[0]

    def largest_batch(self, limit: int) -> int:
        """Return the most samples of a micro-batch whose peak is at most ``limit`` bytes; 0 for none.

        The peak grows by about the same for each sample, so a line through two peaks finds the limit
        in a few steps.
        """
        measured: dict[int, int] = {}
        fits, too_many = 0, MOST_SAMPLES + 1
        size = self.batch_size
        while too_many - fits > 1:
            measured[size] = self.peak(size).total
            if measured[size] <= limit:
                fits = size
            else:
                too_many = size
            size = _next_size(measured, limit, fits, too_many)
        return fits

    def _follow(self) -> None:
        """Take a step that makes what lasts from step to step, and say what is for what."""
        run, timeline = self.run, self._timeline
        step = run.strategy.optimizer_step
        kept = {kind: HOST if self._offloads else kind for kind in KINDS}

        def optimizer_step(names: Any = None) -> None:
            grads = (p.grad for p in run.task.parameters() if p.grad is not None)
            timeline.note(kept["gradients"], grads)
            step(names)

        vars(run.strategy)["optimizer_step"] = optimizer_step
        with self._mode, timeline:
            _keep_buckets(run.strategy)
            timeline.note(kept["parameters"], run.task.parameters())
            timeline.note("parameters", run.task.buffers())
        self.peak()
        for module in run.task.modules():
            for group in groups_of(module) if hasattr(module, "_get_fsdp_state") else ():
                for each in group.fsdp_params:
                    whole = each._unsharded_param
                    whole.register_post_accumulate_grad_hook(
                        lambda parameter: timeline.note("gradients", [parameter.grad])
                    )
        for optimizer in run.optimizers.values():
            timeline.note(kept["optimizer state"], tensors_in(list(optimizer.state.values())))


@contextmanager
def planned_run(make_task: Callable[[], Task], options: Options) -> Iterator[PlannedRun]:
    """Inside, a run is prepared as ``Fit(**options).run`` prepares it on rank 0 of its ranks.

    Args:
        make_task: makes the task; its parameters take no memory.
        options: the options; ``devices`` and ``nodes`` may be any numbers, and "auto" is one device.

    Raises:
        OptionError: an option whose memory cannot be foreseen.
        TaskError: the step depends on values of tensors, and not on shapes alone.
    """
    devices = 1 if options.devices == "auto" else options.devices
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with absent_ranks(devices, options.nodes):
        notes = _notes(options)
        options = Options(**{**vars(options), **_OFF})
        strategy = _plannable(options)
        with fake_parameters(mode):
            task = make_task()
            make_fake(task, mode)
            run = new_run(task, Options(**{**vars(options), "strategy": strategy}))
            try:
                prepare_training(run)
                make_fake(task, mode)
                for communicator in {id(c): c for c in (strategy.world, strategy.dp)}.values():
                    send_real_objects(communicator)
                if isinstance(run.loops.step, StepLoop):
                    # The first weight of a run would tell it. No size depends on it.
                    run.loops.step._scale = run.progress, 1.0
                yield PlannedRun(run, mode, devices * options.nodes, notes)
            finally:
                strategy.teardown(failed=True)


def _plannable(options: Options) -> Strategy:
    """Return a strategy of the engine that works on fake tensors.

    Raises:
        OptionError: the memory of an option cannot be foreseen.
    """
    if options.device_map is not None:
        raise OptionError("plan foresees one device of each rank: leave device_map out")
    strategy = copy.copy(build_strategy(options))
    if isinstance(strategy, DeepSpeed):
        raise OptionError(
            "plan cannot foresee strategy='deepspeed', which keeps flat buffers of its own: plan "
            "strategy='fsdp', which shards alike, or measure with loopkit bench memory"
        )
    if parse_activation_checkpointing(options.activation_checkpointing)[1]:
        raise OptionError(
            "plan cannot foresee activation_checkpointing='offload', which moves activations to the "
            "host: leave it out, and plan 'full' instead"
        )
    if isinstance(strategy, DDP):
        strategy._compress = _answered(strategy._compress)
    return strategy


def _answered(compress: Any) -> Callable[..., Any]:
    """Return a communication hook whose sum is there at once, with the buffers of ``compress``.

    Raises:
        OptionError: the buffers of that compression are not known.
    """
    dtypes = {None: None, "fp16": torch.float16, "bf16": torch.bfloat16}
    if compress not in dtypes:
        raise OptionError(
            f"plan cannot foresee DDP(compress={compress!r}), whose buffers depend on the hook: "
            "leave it out, or give 'bf16' or 'fp16'"
        )
    dtype = dtypes[compress]

    def hook(state: Any, bucket: Any) -> Any:
        buffer = bucket.buffer()
        sent = buffer if dtype is None else buffer.to(dtype)
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(buffer.copy_(sent) if dtype is not None else buffer)
        return done

    return lambda state, bucket: hook(state, bucket)  # torch compares annotations


class _FixedBuckets:
    """The reducer of DistributedDataParallel, which keeps its first buckets.

    Its second step would sort them by the order of the gradients, of which rank 0 sends the values.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _keep_buckets(strategy: Strategy) -> None:
    if isinstance(strategy, DDP):
        strategy.step_fn("train_step")  # wraps the task
        if strategy._wrapped is not None:
            vars(strategy._wrapped)["reducer"] = _FixedBuckets(strategy._wrapped.reducer)


def _notes(options: Options) -> list[str]:
    notes = []
    if options.compile:
        notes.append("compile is left out: a compiled step keeps less for the backward pass")
    if options.hooks:
        names = ", ".join(type(hook).__name__ for hook in options.hooks)
        notes.append(f"hooks are left out ({names}): those that average weights keep a copy more")
    if options.micro_batch is not None:
        notes.append("micro_batch='auto' is left out: the plan is of whole micro-batches")
    return notes


def _largest_batch(run: Run) -> tuple[Any, int]:
    """Return the micro-batch with most elements of the first ones of the data, and its samples."""
    found: tuple[int, Any, int] | None = None
    groups = run.train_loader.open(0, 0)
    for _ in range(_READ):
        group = next(groups, None)
        if group is None:
            break
        for batch, size in zip(group, group.sizes):
            elements = sum(tensor.numel() for tensor in tensors_in(batch))
            if size and (found is None or elements > found[0]):
                found = elements, batch, size
    if found is None:
        raise TaskError(
            f"{name_of(run.task)}.train_data() gives no batch: there is no step to plan"
        )
    return found[1:]


def _next_size(measured: dict[int, int], limit: int, fits: int, too_many: int) -> int:
    """Return the size to look at next, between one that fits and one that does not."""
    sizes = sorted(measured, key=lambda size: abs(measured[size] - limit))[:2]
    guess = 2 * max(measured)
    if len(sizes) == 2:
        (low, at_low), (high, at_high) = sorted((size, measured[size]) for size in sizes)
        slope = (at_high - at_low) / (high - low)
        guess = int(low + (limit - at_low) / slope) if slope > 0 else guess
    elif measured[sizes[0]] > limit:
        guess = sizes[0] // 2
    if too_many in measured and len(measured) % 3 == 0:
        guess = (fits + too_many) // 2  # where the peaks are no line
    return max(fits + 1, min(guess, too_many - 1))


def _needs_values(task: Task, error: Exception) -> TaskError:
    """Return the error for a step that depends on the values of tensors; it names the line."""
    here = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(here) and not frame.filename.startswith("<")
    ]
    where = name_of(task)
    if frames:
        last = frames[-1]
        line = linecache.getline(last.filename, last.lineno or 0).strip()
        where = f"{last.filename}:{last.lineno}, in {last.name}: {line}"
    if isinstance(error, UnsupportedOperatorException):
        return TaskError(
            f"plan knows no shapes for an operator ({error}) at {where}. Register a fake for it "
            "(torch.library.register_fake), or measure with loopkit bench memory"
        )
    return TaskError(
        f"the step reads values of a tensor at {where}. plan has shapes and no values: measure with "
        "loopkit bench memory, or write that line without the values"
    )

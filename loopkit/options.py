"""Options: every keyword of Fit, checked when it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from loopkit.devices import ACCELERATORS
from loopkit.durations import Duration
from loopkit.errors import OptionError, nearest
from loopkit.events import Hook
from loopkit.keywords import checks_keywords
from loopkit.loggers.base import Logger
from loopkit.loggers.registry import check_loggers
from loopkit.monitor import Monitor
from loopkit.strategies.activation_checkpointing import parse_activation_checkpointing
from loopkit.strategies.base import Strategy
from loopkit.strategies.compile import Compile
from loopkit.strategies.device_map import parse_device_map
from loopkit.strategies.nonfinite import ON_NAN
from loopkit.strategies.precision import parse_precision

if TYPE_CHECKING:
    from loopkit.strategies.tensor_parallel import TensorParallel

    StrategyLike: TypeAlias = str | Strategy | TensorParallel
else:
    StrategyLike: TypeAlias = str | Strategy  # what the command line makes of classes by name
Every: TypeAlias = "str | int"
RNGS = ("counter", "stream")


@checks_keywords
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is saved, when, and what is kept.

    Args:
        every: the cadence of saves; the last step of a run is saved in any case.
        keep: how many of the newest to keep; None keeps all. The newest good one and the best
            always stay.
        best: the metric that decides which is best, as ``"eval/accuracy:max"`` or
            ``"eval/loss:min"``.
        keep_best: how many of the best to keep besides.
        load_best: give the task the weights of the best checkpoint when the run is over.
        weights_only: save parameters and buffers alone; such a checkpoint cannot be resumed.
        background: write in a thread, while training goes on.
    """

    every: Every = "1 epoch"
    keep: int | None = 3
    best: str | None = None
    keep_best: int = 1
    load_best: bool = False
    weights_only: bool = False
    background: bool = True

    def __post_init__(self) -> None:
        Duration.parse(self.every, "Checkpoint(every=)")
        for name in ("keep", "keep_best"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise OptionError(
                    f"Checkpoint({name}={value!r}): give a whole number of at least 1"
                )
        self.monitor()
        if self.load_best and self.best is None:
            raise OptionError("Checkpoint(load_best=True) needs best=, as in best='eval/loss:min'")

    def monitor(self) -> Monitor | None:
        """Return the metric that decides which checkpoint is best; None without one."""
        return None if self.best is None else Monitor.parse(self.best, "Checkpoint(best=)")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a task is trained.

    Args:
        strategy: where it runs: "auto" (DDP where there are several devices), "single", "ddp",
            "fsdp", "deepspeed", or a Strategy or TensorParallel object.
        devices: how many devices on this machine, a process each: "auto" (all GPUs, or one CPU
            process) or a number.
        nodes: how many machines; each is started by torchrun or srun.
        accelerator: "auto", "cpu", "cuda" or "mps".
        device_map: the layers of one model on several devices of one process: "auto", or the device
            of each part by the start of its name, as {"encoder": "cpu", "head": "cuda:0"}.
        precision: "fp32", "tf32", "bf16", "fp16" (autocast; fp16 with a scaler), "bf16-true",
            "fp16-true" or "fp64".
        epochs: passes over the data; fractions are taken. 1 where neither steps nor time is given.
        steps: optimizer steps. Of several limits the first reached ends the run.
        time: how long to train: "2 h", "30 min", or seconds.
        batch_size: samples per device and micro-batch, where the task returns a Dataset.
        eval_batch_size: the same for evaluation and prediction; None takes batch_size.
        global_batch_size: samples per optimizer step on all devices; accumulation is derived from
            it.
        accumulate: micro-batches per optimizer step.
        micro_batch: "auto" takes micro-batches in smaller parts where memory runs out, with the
            same gradient.
        clip_norm: the largest norm of all gradients together.
        clip_value: the largest absolute value of any element of a gradient.
        eval_every: cadence of evaluations: "500 steps", "1 epoch", "10%", "30 min", "never" or a
            number of steps.
        eval_after: leave out evaluations that fall due before this point of training: "500 steps",
            "1 epoch", "10%", "30 min" or a number of steps; those at the start (eval_first) and the
            end of the run stay.
        eval_first: evaluate before the first step.
        log_every: cadence of logs; step 1 is always logged.
        checkpoint: what is saved: a Checkpoint, True for its defaults, False for nothing.
        resume: "auto" (the newest good checkpoint of run_dir, or a fresh start), a checkpoint or
            run directory.
        run_dir: where everything of this run goes; None makes the next runs/<task>/<n>.
        hooks: listeners, in order.
        loggers: names ("jsonl", "csv", "tensorboard", "wandb", "mlflow", "comet", "clearml",
            "trackio") or Logger objects.
        progress: "auto", "rich", "plain" or False.
        compile: True, or a Compile with its settings.
        activation_checkpointing: compute activations again in the backward pass, to save memory: "full" (every block),
            "every:2", "select:<regular expression>", "class:<name>"; "offload" keeps them on the
            CPU; joined by "+".
        seed: of everything random.
        data_seed: of the data's order and augmentation; None takes seed.
        deterministic: have torch use deterministic algorithms only.
        rng: "counter" (randomness is a function of seed, step and micro-batch) or "stream" (torch's
            own streams).
        on_nan: a loss or gradient that is not finite: "raise" before it is used, "skip" the step,
            or "ignore".
        debug: "numerics" ends the run at the first module whose output or gradient is not finite,
            and names it; slow.
        limit_train: batches per epoch, or a fraction of them.
        limit_eval: batches per evaluation set, or a fraction of them.
        overfit: train and evaluate on this many batches, the same ones each epoch.
        dry_run: do one step of everything, checkpoint and resume included, and leave nothing
            behind.
        step: a StepLoop in place of the default one.
        epoch: an EpochLoop in place of the default one.
        eval: an EvalLoop in place of the default one.
        predict: a PredictLoop in place of the default one.
    """

    strategy: StrategyLike = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    accelerator: str = "auto"
    device_map: str | Mapping[str, str | int] | None = None
    precision: str = "fp32"
    epochs: int | float | None = None
    steps: int | None = None
    time: str | int | float | None = None
    batch_size: int = 32
    eval_batch_size: int | None = None
    global_batch_size: int | None = None
    accumulate: int = 1
    micro_batch: Literal["auto"] | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    eval_every: Every = "1 epoch"
    eval_after: Every | None = None
    eval_first: bool = False
    log_every: Every = "50 steps"
    checkpoint: Checkpoint | bool = True
    resume: str | Path | None = None
    run_dir: str | Path | None = None
    hooks: Sequence[Hook] = ()
    loggers: str | Sequence[str | Logger] | bool | None = ("jsonl", "tensorboard")
    progress: str | bool = "auto"
    compile: bool | Compile = False
    activation_checkpointing: str | None = None
    seed: int = 0
    data_seed: int | None = None
    deterministic: bool = False
    rng: Literal["counter", "stream"] = "counter"
    on_nan: Literal["raise", "skip", "ignore"] = "raise"
    debug: Literal["numerics"] | None = None
    limit_train: int | float | None = None
    limit_eval: int | float | None = None
    overfit: int | None = None
    dry_run: bool = False
    step: Any = field(default=None)
    epoch: Any = field(default=None)
    eval: Any = field(default=None)
    predict: Any = field(default=None)

    def __post_init__(self) -> None:
        parse_precision(self.precision)
        parse_activation_checkpointing(self.activation_checkpointing)
        if self.device_map is not None:
            parse_device_map(self.device_map)
        self._check_choices()
        self._check_numbers()
        self._check_durations()
        self._check_objects()

    def _check_choices(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "rng": RNGS, "on_nan": ON_NAN, "progress": ("auto", "rich", "plain", True, False),
            "debug": (None, "numerics"), "micro_batch": (None, "auto"),
        }  # fmt: skip
        if ":" not in self.accelerator:
            choices["accelerator"] = ACCELERATORS
        for name, accepted in choices.items():
            value = getattr(self, name)
            if value not in accepted:
                hint = nearest(str(value), [a for a in accepted if isinstance(a, str)])
                raise OptionError(
                    f"{name}={value!r} is not known: give one of "
                    f"{', '.join(map(repr, accepted))}.{hint}"
                )

    def _check_numbers(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "eval_batch_size",
            "global_batch_size",
            "accumulate",
            "nodes",
            "overfit",
        ):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise OptionError(f"{name}={value!r}: give a whole number of at least 1")
        for name in ("epochs", "clip_norm", "clip_value"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not value > 0):
                raise OptionError(f"{name}={value!r}: give a number above 0")
        for name in ("limit_train", "limit_eval"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if (
                value is not None
                and not whole
                and not (isinstance(value, float) and 0 < value <= 1)
            ):
                raise OptionError(
                    f"{name}={value!r}: give a whole number of batches, or a fraction such as 0.1"
                )
        if self.devices != "auto" and (not isinstance(self.devices, int) or self.devices < 1):
            raise OptionError(
                f"devices={self.devices!r}: give 'auto' or a whole number of at least 1"
            )
        if not isinstance(self.seed, int):
            raise OptionError(f"seed={self.seed!r}: give a whole number")
        if self.global_batch_size is not None and self.accumulate != 1:
            raise OptionError(
                "global_batch_size and accumulate are both given: accumulation follows from the "
                "first"
            )

    def _check_durations(self) -> None:
        for name in ("eval_every", "log_every"):
            Duration.parse(getattr(self, name), name)
        if (
            self.eval_after is not None
            and Duration.parse(self.eval_after, "eval_after").unit == "never"
        ):
            raise OptionError(
                "eval_after='never' names no point of training: to evaluate never, "
                "give eval_every='never'"
            )
        if isinstance(self.time, (int, float)):
            timed = self.time > 0
        else:
            timed = self.time is None or Duration.parse(self.time, "time").unit == "second"
        if not timed:
            raise OptionError(
                f"time={self.time!r}: give a length of time above 0, such as '30 min' or seconds"
            )

    def _check_objects(self) -> None:
        for hook in self.hooks:
            if not isinstance(hook, Hook):
                hint = (
                    "; give an instance, with ()"
                    if isinstance(hook, type)
                    else ": derive it from loopkit.Hook"
                )
                raise OptionError(f"hooks holds {hook!r}, which is not a Hook{hint}")
        for name, kind in (("checkpoint", Checkpoint), ("compile", Compile)):
            value = getattr(self, name)
            if not isinstance(value, (bool, kind)):
                raise OptionError(f"{name}={value!r}: give True, False or a {kind.__name__}(...)")
        check_loggers(self.loggers)
        for name in ("step", "epoch", "eval", "predict"):
            loop = getattr(self, name)
            if loop is not None and (
                isinstance(loop, type) or not callable(getattr(loop, "run", None))
            ):
                raise OptionError(f"{name}={loop!r} is no loop: give an object with run(run, ...)")

    def saves(self) -> Checkpoint | None:
        """The checkpoint settings; None when nothing is saved."""
        if isinstance(self.checkpoint, Checkpoint):
            return self.checkpoint
        return Checkpoint() if self.checkpoint else None

    def seconds(self) -> float | None:
        """The time limit in seconds."""
        if self.time is None or isinstance(self.time, (int, float)):
            return self.time
        return float(Duration.parse(self.time, "time").amount)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values; objects by their repr."""
        plain = (str, int, float, bool, type(None))
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {
            name: value if isinstance(value, plain) else _named(value)
            for name, value in values.items()
        }


def _named(value: Any) -> Any:
    """A value as text: settings by their repr, other objects by their class."""
    if isinstance(value, (list, tuple)):
        return [_named(part) for part in value]
    if isinstance(value, Mapping):
        return {
            str(name): part if isinstance(part, (str, int)) else str(part)
            for name, part in value.items()
        }
    if isinstance(value, (str, Path, Checkpoint, Compile)):
        return str(value)
    return type(value).__name__

"""The options of Fit, checked when they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from loopkit.checks import checked_choice, checked_int, checked_number
from loopkit.devices import ACCELERATORS
from loopkit.durations import Duration, parse_seconds
from loopkit.errors import OptionError
from loopkit.events import Hook
from loopkit.foreign_values import answer_value
from loopkit.keywords import checks_keywords
from loopkit.loggers.base import Logger
from loopkit.loggers.registry import check_loggers
from loopkit.monitor import Monitor
from loopkit.storage.urls import as_url, check_url, place_of
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
    # The command line builds strategies from the names of their classes.
    StrategyLike: TypeAlias = str | Strategy
Every: TypeAlias = str | int
RNGS = ("counter", "stream")


@checks_keywords
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is saved, when, and which checkpoints are kept.

    Args:
        every: how often to save, such as ``"500 steps"`` or ``"1 epoch"``. The last step of a run
            is always saved.
        keep: how many of the newest checkpoints to keep; None keeps all. The newest valid
            checkpoint and the best one are always kept.
        best: the metric that decides which checkpoint is best, with its mode:
            ``"eval/accuracy:max"`` or ``"eval/loss:min"``.
        keep_best: how many of the best checkpoints to keep besides the newest.
        load_best: load the best checkpoint's weights into the task when the run ends.
        weights_only: save only parameters and buffers. Such a checkpoint cannot be resumed.
        background: write in a thread while training continues.
        save_on_each_node: each machine keeps checkpoints in a ``run_dir`` on a disk of its own.
            It needs ``run_dir=``. By default all machines share one directory.

    Raises:
        OptionError: a value that is not accepted.
    """

    every: Every = "1 epoch"
    keep: int | None = 3
    best: str | None = None
    keep_best: int = 1
    load_best: bool = False
    weights_only: bool = False
    background: bool = True
    save_on_each_node: bool = False

    def __post_init__(self) -> None:
        Duration.parse(self.every, "Checkpoint(every=)")
        checked_int(self.keep, "Checkpoint(keep=)", or_none=True)
        checked_int(self.keep_best, "Checkpoint(keep_best=)")
        if self.monitor() is None and self.load_best:
            raise OptionError("Checkpoint(load_best=True) needs best=, as in best='eval/loss:min'")

    def monitor(self) -> Monitor | None:
        """Return the metric that decides which checkpoint is best; None without one."""
        return None if self.best is None else Monitor.parse(self.best, "Checkpoint(best=)")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``Fit``: how a task is trained.

    Args:
        strategy: where the task runs: "auto" (DDP where there are several devices), "single",
            "ddp", "fsdp", "deepspeed", or a Strategy or TensorParallel object.
        devices: the number of devices on this machine, one process for each; "auto" takes all GPUs,
            or one process on the CPU.
        nodes: the number of machines; torchrun or srun starts the processes of each.
        accelerator: the kind of device: "auto", "cpu", "cuda" or "mps".
        device_map: splits the layers of one model over several devices of one process: "auto", or
            a device for each prefix of a module's name, as {"encoder": "cpu", "head": "cuda:0"}.
        precision: the dtype of the computation: "fp32", "tf32", "bf16", "fp16" (autocast; fp16 with
            a loss scaler), "bf16-true", "fp16-true" or "fp64".
        epochs: passes over the data, which may be a fraction; 1 where no limit is given.
        steps: optimizer steps. Of several limits, the first that is reached ends the run.
        time: how long to train: "2 h", "30 min", or seconds.
        job_margin: how long before the end of its SLURM job a run saves and ends: "5 min", seconds,
            "auto" (2 minutes, or a tenth of a short job), or False, which lets SLURM end it.
        batch_size: samples per device and micro-batch, where the task returns a Dataset.
        eval_batch_size: samples per device and batch in evaluation and prediction; None takes
            batch_size.
        global_batch_size: samples per optimizer step over all devices; the number of micro-batches
            to accumulate follows from it.
        accumulate: micro-batches per optimizer step.
        micro_batch: "auto" splits micro-batches that do not fit into memory; the gradient stays the
            same.
        clip_norm: clips gradients to this norm, taken over all parameters together.
        clip_value: clips each element of a gradient to this absolute value.
        eval_every: how often to evaluate: "500 steps", "1 epoch", "10%", "30 min", "never" or a
            number of steps.
        eval_after: skips evaluations that are due before this point of training: "500 steps",
            "1 epoch", "10%", "30 min" or a number of steps. It does not skip the evaluation at the
            start (eval_first) and the one at the end.
        eval_first: evaluates before the first step.
        log_every: how often to log; step 1 is always logged.
        checkpoint: what to save: a Checkpoint, True for its defaults, or False for nothing.
        resume: where to continue from: "auto" (the newest valid checkpoint of run_dir, or the
            start), or the path or URL of a checkpoint or run directory, or what
            ray.train.get_checkpoint() returns.
        run_dir: the directory for all files of this run, or a URL such as s3://bucket/runs/a; None
            makes the next runs/<task>/<n>.
        hooks: the hooks to call, in this order.
        loggers: where to log: names ("jsonl", "csv", "tensorboard", "wandb", "mlflow", "comet",
            "clearml", "trackio") or Logger objects.
        progress: how to show progress: "auto", "rich" (a terminal), "html" (a notebook), "plain" or
            False.
        compile: compiles the task with torch.compile: True, or a Compile with its settings.
        activation_checkpointing: recomputes activations in the backward pass to save memory: "full"
            (every block), "every:2", "select:<regular expression>" or "class:<name>"; "offload"
            keeps them in CPU memory instead. "+" joins two of them.
        seed: seeds torch, NumPy, Python's random and, unless data_seed is given, the order of the
            data.
        data_seed: seeds the order and the augmentation of the data; None takes seed.
        deterministic: makes torch use deterministic algorithms only.
        rng: "counter" makes randomness a function of seed, step and micro-batch; "stream" uses
            torch's own random streams.
        on_nan: what to do about a loss or gradient that is not finite: "raise" before the update,
            "skip" the step, or "ignore" it.
        debug: "numerics" ends the run at the first module whose output or gradient is not finite,
            and names the module; slow.
        limit_train: batches per epoch, or a fraction of them.
        limit_eval: batches per evaluation set, or a fraction of them.
        overfit: trains and evaluates on this many batches, the same ones each epoch.
        dry_run: does one step of everything, checkpoint and resume included, and leaves no files.
        step: a StepLoop that replaces the default one.
        epoch: an EpochLoop that replaces the default one.
        eval: an EvalLoop that replaces the default one.
        predict: a PredictLoop that replaces the default one.

    Raises:
        OptionError: a value that is not accepted, or options that contradict each other.
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
    job_margin: str | int | float | bool = "auto"
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
        for option in fields(self):
            value = getattr(self, option.name)
            answer = "" if value == option.default else answer_value(option.name, value)
            if answer:
                raise OptionError(f"{option.name}={value!r}{answer}")
        object.__setattr__(self, "resume", place_of(self.resume, "resume"))
        for name in ("run_dir", "resume"):
            if (url := as_url(getattr(self, name))) is not None:
                check_url(url, name)
        parse_precision(self.precision)
        parse_activation_checkpointing(self.activation_checkpointing)
        if self.device_map is not None:
            parse_device_map(self.device_map)
        check_loggers(self.loggers)
        self._check_choices()
        self._check_numbers()
        self._check_limits()
        self._check_durations()
        self._check_objects()

    def _check_choices(self) -> None:
        checked_choice(self.rng, "rng", RNGS)
        checked_choice(self.on_nan, "on_nan", ON_NAN)
        checked_choice(self.progress, "progress", ("auto", "rich", "html", "plain", True, False))
        checked_choice(self.debug, "debug", (None, "numerics"))
        checked_choice(self.micro_batch, "micro_batch", (None, "auto"))
        if ":" not in self.accelerator:
            checked_choice(self.accelerator, "accelerator", ACCELERATORS)

    def _check_numbers(self) -> None:
        for name in ("batch_size", "accumulate", "nodes"):
            checked_int(getattr(self, name), name)
        for name in ("steps", "eval_batch_size", "global_batch_size", "overfit"):
            checked_int(getattr(self, name), name, or_none=True)
        for name in ("epochs", "clip_norm", "clip_value"):
            checked_number(getattr(self, name), name, above=0, or_none=True)
        if self.devices != "auto" and (not isinstance(self.devices, int) or self.devices < 1):
            raise OptionError(
                f"devices={self.devices!r}: give 'auto' or a whole number of at least 1"
            )
        if not isinstance(self.seed, int):
            raise OptionError(f"seed={self.seed!r}: give a whole number")
        if self.global_batch_size is not None and self.accumulate != 1:
            raise OptionError(
                "global_batch_size and accumulate are both given: leave accumulate out, which "
                "follows from global_batch_size"
            )

    def _check_limits(self) -> None:
        for name in ("limit_train", "limit_eval"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            fraction = isinstance(value, float) and 0 < value <= 1
            if value is not None and not whole and not fraction:
                raise OptionError(
                    f"{name}={value!r}: give a whole number of batches, or a fraction such as 0.1"
                )

    def _check_durations(self) -> None:
        Duration.parse(self.eval_every, "eval_every")
        Duration.parse(self.log_every, "log_every")
        if self.eval_after is not None:
            after = Duration.parse(self.eval_after, "eval_after")
            if after.unit == "never":
                raise OptionError(
                    "eval_after='never' names no point of training: "
                    "to switch evaluation off, give eval_every='never'"
                )
        if self.time is not None:
            parse_seconds(self.time, "time")
        if self.job_margin is not False and self.job_margin != "auto":
            parse_seconds(self.job_margin, "job_margin")

    def _check_objects(self) -> None:
        if not isinstance(self.hooks, Iterable):
            raise OptionError(f"hooks={self.hooks!r}: give a list, as hooks=[...]")
        for hook in self.hooks:
            if isinstance(hook, Hook):
                continue
            advice = ": derive it from loopkit.Hook"
            if isinstance(hook, type):
                advice = "; give an instance, with ()"
            raise OptionError(f"hooks holds {hook!r}, which is not a Hook{advice}")
        for name, kind in (("checkpoint", Checkpoint), ("compile", Compile)):
            value = getattr(self, name)
            if not isinstance(value, (bool, kind)):
                raise OptionError(f"{name}={value!r}: give True, False or a {kind.__name__}(...)")
        saves = self.saves()
        if saves is not None and saves.save_on_each_node and self.run_dir is None:
            raise OptionError(
                "Checkpoint(save_on_each_node=True) needs run_dir=, the directory on each machine's disk"
            )
        for name in ("step", "epoch", "eval", "predict"):
            loop = getattr(self, name)
            is_loop = not isinstance(loop, type) and callable(getattr(loop, "run", None))
            if loop is not None and not is_loop:
                raise OptionError(
                    f"{name}={loop!r} is not a loop: give an object with run(run, ...)"
                )

    def saves(self) -> Checkpoint | None:
        """Return the checkpoint settings; None when nothing is saved."""
        if isinstance(self.checkpoint, Checkpoint):
            return self.checkpoint
        return Checkpoint() if self.checkpoint else None

    @property
    def url(self) -> str | None:
        """The URL of the run directory; None where it is a path."""
        return as_url(self.run_dir)

    def monitor(self) -> Monitor | None:
        """Return the metric that decides about the best checkpoint; None without one."""
        saves = self.saves()
        return None if saves is None else saves.monitor()

    def seconds(self) -> float | None:
        """Return the time limit in seconds; None without one."""
        return None if self.time is None else parse_seconds(self.time, "time")

    def job_margin_seconds(self) -> float | None:
        """Return the seconds that ``job_margin`` gives; None for "auto"."""
        return None if self.job_margin == "auto" else parse_seconds(self.job_margin, "job_margin")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values; settings as text, other objects by their class."""
        return {option.name: _as_json(getattr(self, option.name)) for option in fields(self)}


def _as_json(value: Any) -> Any:
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_as_json(part) for part in value]
    if isinstance(value, Mapping):
        return {
            str(name): part if isinstance(part, (str, int)) else str(part)
            for name, part in value.items()
        }
    if isinstance(value, (Path, Checkpoint, Compile)):
        return str(value)
    return type(value).__name__

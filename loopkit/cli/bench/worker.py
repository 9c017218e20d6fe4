"""A measured run in a process of its own: ``python -m loopkit.cli.bench.worker RESULT STEPS TARGET
[--option value ...]``.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from loopkit.cli.args.request import Command, read_request
from loopkit.errors import LoopkitError
from loopkit.events import Hook
from loopkit.fit.fit import Fit
from loopkit.optim import AdamW
from loopkit.run import Run
from loopkit.task import Task

WARM_UP = 3  # steps before the clock counts: the first ones allocate, load and tune
# What a measured run does without: it trains, and nothing else.
FIXED = {
    "epochs": None, "time": None, "resume": None, "checkpoint": False, "loggers": None, "progress": False,
    "eval_every": "never", "eval_after": None, "eval_first": False, "log_every": "never", "dry_run": False,
}  # fmt: skip
HIDDEN = (*FIXED, "steps", "run_dir", "strategy", "devices", "nodes")
PROBE = Command("bench", "", {}, hidden=HIDDEN)


class Gauge(Hook):
    """Notes the time of every step and the bytes that training takes.

    Attributes:
        facts: what was found, by name: bytes, seconds, counts.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._times: list[float] = []
        self._samples: list[int] = []
        self._loss: Any = None
        self._level = 0
        gc.collect()
        with suppress(
            OSError, AttributeError
        ):  # what building the task has freed is not its memory
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        self._level = level()

    def on_micro_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Once, the bytes of the gradients: they are gone when a step is over."""
        if "gradient_bytes" not in self.facts:
            grads = [p.grad for p in run.task.parameters() if p.grad is not None]
            self.facts["gradient_bytes"] = _bytes(grads)

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """The time, once the device has done the step."""
        if run.strategy.device.type == "cuda":
            torch.cuda.synchronize()
        self._times.append(perf_counter())
        self._samples.append(run.progress.samples)
        self._loss = out.get("loss") if isinstance(out, Mapping) else None

    def on_fit_end(self, run: Run) -> None:
        """What the run took.

        Raises:
            LoopkitError: the run stopped before there was anything to measure.
        """
        if len(self._times) <= WARM_UP:
            raise LoopkitError(
                f"the run stopped after {len(self._times)} steps, and the first {WARM_UP} do not "
                f"count"
            )
        device, parameters = run.strategy.device, list(run.task.parameters())
        times, samples = self._times[WARM_UP - 1 :], self._samples[WARM_UP - 1 :]
        seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
        state = [
            value
            for o in run.optimizers.values()
            for held in o.state.values()
            for value in held.values()
        ]
        self.facts |= {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "parameter_bytes": _bytes(parameters),
            "optimizer_bytes": _bytes(state),
            "peak_bytes": self._peak(device),
            "step_ms": 1e3 * seconds,
            "samples_per_second": (samples[-1] - samples[0]) / (len(samples) - 1) / seconds,
            "loss": None if self._loss is None else float(self._loss),
            "problem": None,
        }

    def _peak(self, device: torch.device) -> int | None:
        if device.type == "cuda":  # of all of them, where layers are spread over several
            return sum(
                torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())
            )
        peak = highest()
        return None if device.type != "cpu" or peak is None else peak - self._level


def _bytes(tensors: Iterable[Any]) -> int:
    held = {id(t): t for t in tensors if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in held.values())


def level() -> int:
    """Bytes of memory that this process holds now; from here on ``highest`` counts, where the
    system lets it.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # Linux: the peak starts again from what is held
        return _status("VmRSS")
    return highest() or 0


def highest() -> int | None:
    """The most bytes of memory that this process held since ``level``; None where the system does
    not say.
    """
    with suppress(OSError):
        return _status("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class _Rehearsal(Task):
    """Two layers, trained for two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def train_step(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[0])

    def optimizers(self) -> Any:
        return AdamW(lr=1e-3)

    def train_data(self) -> Any:
        return TensorDataset(torch.ones(8, 8))


def rehearse(options: Mapping[str, Any]) -> None:
    """Train a trifle the same way, so that what torch loads when it first trains is not taken for
    the task's.
    """
    alike = {name: options[name] for name in ("precision", "accelerator") if name in options}
    if options.get("activation_checkpointing"):
        alike["activation_checkpointing"] = "full"
    Fit(**FIXED | alike, steps=2, batch_size=4, run_dir=options["run_dir"]).run(_Rehearsal())


def measure(words: Sequence[str], steps: int) -> dict[str, Any]:
    """Train the target for ``steps`` steps that count, and say what that took.

    Returns:
        Facts by name; ``{"problem": reason}`` where the run could not be made.
    """
    try:
        request, _ = read_request(PROBE, words)
        assert request is not None
        values = request.values()
        with tempfile.TemporaryDirectory(prefix="loopkit-bench-") as place:
            options = {"strategy": "single", **values.fit, **FIXED, "run_dir": place}
            rehearse(options)
            task = request.task(**values.task)
            gauge = Gauge()
            hooks = [*options.pop("hooks", ()), gauge]
            Fit(**options, hooks=hooks, steps=WARM_UP + steps).run(task)
            return gauge.facts
    except LoopkitError as error:
        return {"problem": str(error)}
    except Exception as error:
        traceback.print_exc()
        text = str(error).partition("\n")[0]
        return {"problem": f"{type(error).__name__}: {text}" if text else type(error).__name__}


if __name__ == "__main__":
    result, count, *rest = sys.argv[1:]
    Path(result).write_text(json.dumps(measure(rest, int(count))))

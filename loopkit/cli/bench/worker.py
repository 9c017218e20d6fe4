"""The process that ``loopkit bench`` starts for each run.

It is called as ``python -m loopkit.cli.bench.worker RESULT STEPS TARGET [--option value ...]``.
"""

from __future__ import annotations

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
from loopkit.cpu_memory import return_freed_memory
from loopkit.devices import peak_bytes, process_bytes
from loopkit.errors import LoopkitError
from loopkit.events import Hook
from loopkit.fit.fit import Fit
from loopkit.optim import AdamW
from loopkit.run import Run
from loopkit.task import Task

WARM_UP = 3  # steps that do not count: the first steps allocate, load libraries and tune kernels
# A measured run trains and does nothing else.
FIXED = {
    "epochs": None, "time": None, "resume": None, "checkpoint": False, "loggers": None, "progress": False,
    "eval_every": "never", "eval_after": None, "eval_first": False, "log_every": "never", "dry_run": False,
}  # fmt: skip
HIDDEN = (*FIXED, "steps", "run_dir", "strategy", "devices", "nodes")
BENCH = Command("bench", "", {}, hidden=HIDDEN)


class Gauge(Hook):
    """Measures the time of every step and the bytes of training.

    Attributes:
        facts: the measured values by name.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._times: list[float] = []
        self._samples: list[int] = []
        self._loss: Any = None
        gc.collect()
        # Memory that was freed while the task was built is not the task's: give it back.
        return_freed_memory()
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
        self._start_bytes = reset_peak()

    def on_micro_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Count the gradients' bytes once; at the end of a step the gradients are gone."""
        if "gradient_bytes" not in self.facts:
            grads = [p.grad for p in run.task.parameters() if p.grad is not None]
            self.facts["gradient_bytes"] = _bytes(grads)

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Note the time at which the device has completed the step."""
        if run.strategy.device.type == "cuda":
            torch.cuda.synchronize()
        self._times.append(perf_counter())
        self._samples.append(run.progress.samples)
        self._loss = out.get("loss") if isinstance(out, Mapping) else None

    def on_fit_end(self, run: Run) -> None:
        """Compute the facts.

        Raises:
            LoopkitError: the run stopped before a step was measured.
        """
        if len(self._times) <= WARM_UP:
            raise LoopkitError(
                f"the run stopped after {len(self._times)} steps, "
                f"and the first {WARM_UP} do not count"
            )
        device = run.strategy.device
        parameters = list(run.task.parameters())
        times = self._times[WARM_UP - 1 :]
        samples = self._samples[WARM_UP - 1 :]
        seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
        samples_per_step = (samples[-1] - samples[0]) / (len(samples) - 1)
        states = [state for o in run.optimizers.values() for state in o.state.values()]
        self.facts |= {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
            "parameter_bytes": _bytes(parameters),
            "optimizer_bytes": _bytes(value for state in states for value in state.values()),
            "peak_bytes": self._peak_bytes(device),
            "step_ms": 1e3 * seconds,
            "samples_per_second": samples_per_step / seconds,
            "loss": None if self._loss is None else float(self._loss),
            "problem": None,
        }

    def _peak_bytes(self, device: torch.device) -> int | None:
        if device.type == "cuda":  # the sum over all GPUs, because of device_map
            return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        peak = peak_bytes()
        return None if device.type != "cpu" or peak is None else peak - self._start_bytes


def _bytes(tensors: Iterable[Any]) -> int:
    distinct = {id(t): t for t in tensors if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in distinct.values())


def reset_peak() -> int:
    """Begin the peak of ``peak_bytes`` again, where the system can; return the bytes held now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux
        return process_bytes("VmRSS")
    return peak_bytes() or 0


class _WarmUpTask(Task):
    """Two small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def train_step(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[0])

    def optimizers(self) -> Any:
        return AdamW(lr=1e-3)

    def train_data(self) -> Any:
        return TensorDataset(torch.ones(8, 8))


def warm_up(options: Mapping[str, Any]) -> None:
    """Train a small task in the same way.

    The memory of what torch loads in the first training is then not counted as the target's.
    """
    same = {name: options[name] for name in ("precision", "accelerator") if name in options}
    if options.get("activation_checkpointing"):
        same["activation_checkpointing"] = "full"
    Fit(**FIXED | same, steps=2, batch_size=4, run_dir=options["run_dir"]).run(_WarmUpTask())


def measure(argv: Sequence[str], steps: int) -> dict[str, Any]:
    """Train the target for ``steps`` measured steps.

    Returns:
        The facts by name; ``{"problem": reason}`` if the run failed.
    """
    try:
        request = read_request(BENCH, argv)
        assert request is not None
        values = request.values()
        with tempfile.TemporaryDirectory(prefix="loopkit-bench-") as directory:
            options = {"strategy": "single", **values.fit, **FIXED, "run_dir": directory}
            warm_up(options)
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

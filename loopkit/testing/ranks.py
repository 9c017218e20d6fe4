"""check_ranks: the numbers of a run do not depend on how many ranks share its batches."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from loopkit.events import Hook
from loopkit.fit.fit import Fit
from loopkit.run import Run
from loopkit.strategies.dtensor import full_tensor
from loopkit.task import Task
from loopkit.testing.forks import Ended, in_fork, on_forked_ranks
from loopkit.testing.trace import require, train


@dataclass(frozen=True)
class RanksReport:
    """What was compared.

    Attributes:
        steps: the steps of the run.
        exact: whether the weights are the same bit for bit.
        difference: the largest difference of a weight, relative to the largest of its tensor.
    """

    steps: int
    exact: bool
    difference: float


class _KeepsWeights(Hook):
    """Writes the whole weights into a file at the end."""

    may_request = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, run: Run) -> None:
        """Write them on rank 0. Every rank takes part in gathering them."""
        weights = {
            name: full_tensor(tensor).detach().cpu().clone().contiguous()
            for name, tensor in run.strategy.model_state().items()
        }
        if run.strategy.rank == 0:
            save_file(weights, self.path)


def check_ranks(
    task: Task,
    fit: Fit,
    *,
    ranks: int = 2,
    strategy: Any = "ddp",
    steps: int = 8,
    tolerance: float = 0.0,
    row_tolerance: float = 1e-6,
    ignore: str = "",
    timeout: float = 120,
) -> RanksReport:
    """Check that ``ranks`` processes train to the same weights as one, and log the same rows.

    One process accumulates as many micro-batches more as there are ranks, unless the options give
    a ``global_batch_size``. Ranks are forked processes on the CPU.

    Args:
        task: the task.
        fit: the options of a short run; ``run_dir``, ``loggers``, ``checkpoint`` and ``resume``
            are replaced.
        ranks: how many.
        strategy: of the ranks, such as "ddp" or "fsdp".
        steps: the steps to train.
        tolerance: the largest difference of a weight that passes, relative to the largest weight
            of its tensor. 0 asks for the same bits, which fp32 without ``clip_norm`` gives.
        row_tolerance: the largest relative difference of a logged number.
        ignore: a regular expression of names of logged values that may differ.
        timeout: seconds until ranks that do not end are killed.

    Raises:
        AssertionError: naming the tensor or the row, with the difference.
        OptionError: this process cannot fork, or has used a CUDA device.
        HungError: the ranks did not end in time.
    """
    common = {"steps": steps, "checkpoint": False, "accelerator": "cpu"}
    alone = {**common, "strategy": "single", "devices": "auto"}
    if fit.options.global_batch_size is None:
        alone["accumulate"] = fit.options.accumulate * ranks
    together = {**common, "strategy": strategy, "devices": "auto"}
    with tempfile.TemporaryDirectory(prefix="loopkit-check-") as name:
        place = Path(name)

        def run(what: str, changes: dict[str, Any]) -> dict[str, Any]:
            keeps = _KeepsWeights(place / f"{what}.safetensors")
            trace = train(task, fit, place / what, keeps, ignore=ignore, **changes)
            return {"rows": trace.rows, "step": trace.step}

        one = _value([in_fork(partial(run, "one", alone))])
        several = _value(on_forked_ranks(ranks, partial(run, "several", together), timeout))
        weights = [load_file(place / f"{what}.safetensors") for what in ("one", "several")]
    worst, name = max(
        ((_difference(weights[0][name], weights[1][name]), name) for name in weights[0]),
        default=(0.0, ""),
    )
    if worst > tolerance:
        raise AssertionError(
            f"after {one['step']} steps, {name} differs by {worst:.2g} of its largest value between "
            f"1 and {ranks} ranks"
        )
    _compare_rows(one["rows"], several["rows"], ranks, row_tolerance)
    return RanksReport(one["step"], worst == 0.0, worst)


def _value(ended: list[Ended]) -> Any:
    for rank, each in enumerate(ended):
        if each.code:
            raise AssertionError(f"rank {rank} ended with {each.code}: {each.error}")
    return ended[0].value


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    if not a.numel() or a.equal(b):
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-300))


def _compare_rows(
    one: list[dict[str, Any]], several: list[dict[str, Any]], ranks: int, tolerance: float
) -> None:
    require(len(one) == len(several), f"1 rank logs {len(one)} rows, {ranks} ranks {len(several)}")
    for a, b in zip(one, several):
        for name in sorted(a.keys() | b.keys()):
            x, y = a.get(name), b.get(name)
            same = x == y or (
                isinstance(x, (int, float))
                and isinstance(y, (int, float))
                and (math.isclose(x, y, rel_tol=tolerance) or (math.isnan(x) and math.isnan(y)))
            )
            require(same, f"at step {a['step']}, {name} is {x} on 1 rank and {y} on {ranks}")

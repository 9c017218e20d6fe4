"""Throughput: samples, tokens and floating-point operations per second, and the share of the
device's peak.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from loopkit.checks import checked_number
from loopkit.errors import LoopkitWarning
from loopkit.events import Hook
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run


@checks_keywords
class Throughput(Hook):
    """Logs ``train/samples_per_second`` and, where batches carry ``input_ids``,
    ``train/tokens_per_second``.

    Measured from log to log, over all ranks; the first steps (up to the first log) and evaluations
    are left out, loading data and saving are not. The device is waited for only where a log or the
    like waits for it anyway.

    Args:
        flops: count the operations of one step with ``torch.utils.flop_counter`` (matrix products,
            convolutions and attention, forward and backward) during the first step, which takes
            longer, and log ``train/flops_per_second`` of one device. Steps count alike: with
            batches of differing shapes it is an estimate.
        peak_flops: what one device can do per second at this precision, as its data sheet says;
            then ``train/mfu`` (model FLOPs utilisation, PaLM, Chowdhery et al. 2022), from 0 to 1,
            is logged too.
        clock: seconds, for tests.

    Attributes:
        flops_per_step: of one device; None before the first step, and without ``flops``.

    Raises:
        OptionError: an argument that is not accepted.
    """

    may_request = False

    def __init__(
        self,
        flops: bool = False,
        peak_flops: float | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._count = flops or peak_flops is not None
        self._peak = checked_number(
            peak_flops,
            "Throughput(peak_flops=)",
            above=0,
            or_none=True,
            what="operations per second, such as 989e12,",
        )
        self._clock = clock
        self.flops_per_step: int | None = None

    def on_setup(self, run: Run) -> None:
        """Start anew."""
        self._counter: FlopCounterMode | None = None
        self._since: float | None = None
        self._done = (0, 0, 0)
        self.flops_per_step = None
        if self._count and run.loader is not None and run.strategy.settings.compile is not None:
            warnings.warn(
                "Throughput(flops=True) cannot see into compiled code and counts nothing: count in "
                "a short "
                "run with compile=False",
                LoopkitWarning,
                stacklevel=2,
            )
            self.flops_per_step = 0

    def on_step_start(self, run: Run, batches: Sequence[Any]) -> None:
        """Count the operations of the first step."""
        if self._count and self.flops_per_step is None:
            self._counter = FlopCounterMode(display=False, custom_mapping=_more_formulas())
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Note the rates where a log may follow."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.flops_per_step = self._counter.get_total_flops()
            self._counter = None
        progress = run.progress
        if progress.step < run.triggers.next:
            return
        if run.strategy.device.type == "cuda":
            torch.cuda.synchronize(run.strategy.device)
        now, done = self._clock(), (progress.step, progress.samples, progress.tokens)
        if self._since is not None and now > self._since:
            self._note(run, now - self._since, *(new - old for new, old in zip(done, self._done)))
        self._since, self._done = now, done

    def on_eval_start(self, run: Run) -> None:
        """The clock stops."""
        self._paused = self._clock()

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """The clock goes on."""
        if self._since is not None:
            self._since += self._clock() - self._paused

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Stop counting where the first step broke off."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._counter = None

    def _note(self, run: Run, seconds: float, steps: int, samples: int, tokens: int) -> None:
        rates = {"samples_per_second": samples / seconds}
        if tokens:
            rates["tokens_per_second"] = tokens / seconds
        if self.flops_per_step:
            rates["flops_per_second"] = self.flops_per_step * steps / seconds
            if self._peak is not None:
                rates["mfu"] = rates["flops_per_second"] / self._peak
        for (
            name,
            rate,
        ) in rates.items():  # weighted by time, rates of unequal stretches average exactly
            run.accumulator.add(f"train/{name}", rate, seconds)


def _more_formulas() -> dict[Any, Any]:
    """Attention on a CPU, whose operators torch's own table lacks."""
    aten = torch.ops.aten
    found: dict[Any, Any] = {}
    if hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu"):
        found[aten._scaled_dot_product_flash_attention_for_cpu] = _attention
    if hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu_backward"):
        found[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _attention_backward
    return found


def _attention(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]

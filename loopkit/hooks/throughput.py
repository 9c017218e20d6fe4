"""Throughput: samples, tokens and floating-point operations per second, and the model's MFU."""

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
    """Log ``train/samples_per_second``, and ``train/tokens_per_second`` if batches have ``input_ids``.

    Both are measured from log to log, over all ranks. The steps before the first log and the
    evaluations are left out; loading data and saving are not. The hook waits for the device only
    at a log, which waits for it anyway.

    Examples:
        >>> Fit(hooks=[Throughput(peak_flops=989e12)], precision="bf16").run(task)

    Args:
        flops: count the operations of the first step with ``torch.utils.flop_counter`` (matrix
            products, convolutions and attention, forward and backward), and log
            ``train/flops_per_second`` of one device. All steps are taken to be equal, so with
            batches of differing shapes the number is an estimate. The first step takes longer.
        peak_flops: the operations per second of one device at this precision, from its data sheet.
            Log ``train/mfu`` too, the model FLOPs utilisation from 0 to 1 (Chowdhery et al. 2022,
            PaLM, appendix B).
        clock: returns seconds; for tests.

    Attributes:
        flops_per_step: of one device; None before the first step, and without ``flops``.

    Raises:
        OptionError: an argument is not accepted.
    """

    may_request = False

    def __init__(
        self,
        flops: bool = False,
        peak_flops: float | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._peak = checked_number(
            peak_flops,
            "Throughput(peak_flops=)",
            above=0,
            or_none=True,
            what="operations per second, such as 989e12,",
        )
        self._count = flops or peak_flops is not None
        self._clock = clock
        self.flops_per_step: int | None = None

    def on_setup(self, run: Run) -> None:
        """Start to measure."""
        self._counter: FlopCounterMode | None = None
        self._since: float | None = None
        self._done = (0, 0, 0)
        self.flops_per_step = None
        compiled = run.strategy.settings.compile is not None
        if self._count and run.loader is not None and compiled:
            warnings.warn(
                "Throughput(flops=True) cannot see into compiled code and counts nothing: count in "
                "a short run with compile=False",
                LoopkitWarning,
                stacklevel=2,
            )
            self.flops_per_step = 0

    def on_step_start(self, run: Run, batches: Sequence[Any]) -> None:
        """Begin to count the operations, in the first step."""
        if self._count and self.flops_per_step is None:
            self._counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention())
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Note the rates if a log may follow this step."""
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
            steps, samples, tokens = (new - old for new, old in zip(done, self._done))
            self._note(run, now - self._since, steps=steps, samples=samples, tokens=tokens)
        self._since, self._done = now, done

    def on_eval_start(self, run: Run) -> None:
        """Stop the clock."""
        self._paused = self._clock()

    def on_eval_interrupted(self, run: Run) -> None:
        """Start the clock again."""
        self.on_eval_end(run, {})

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Start the clock again."""
        if self._since is not None:
            self._since += self._clock() - self._paused

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Stop to count if the first step raised."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._counter = None

    def _note(self, run: Run, seconds: float, *, steps: int, samples: int, tokens: int) -> None:
        rates = {"samples_per_second": samples / seconds}
        if tokens:
            rates["tokens_per_second"] = tokens / seconds
        if self.flops_per_step:
            rates["flops_per_second"] = self.flops_per_step * steps / seconds
            if self._peak is not None:
                rates["mfu"] = rates["flops_per_second"] / self._peak
        for name, rate in rates.items():
            # Weighted by the seconds, so that rates over unequal spans have an exact mean.
            run.accumulator.add(f"train/{name}", rate, seconds)


def _cpu_attention() -> dict[Any, Any]:
    """Return FLOP formulas for the attention operators on a CPU, which torch's own table lacks."""
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

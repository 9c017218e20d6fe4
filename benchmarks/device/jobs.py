"""The jobs: a known model, batches that lie ready in host memory, and the clock of the steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

LR = 1e-4
WARM, COUNTED = 10, 6
# Steps: the first ones compile and warm up, the next are timed, and in the last waits are counted.
# One more begins and is not measured: it ends the last of these.


class StepClock:
    """Measures the steps of one run, from one call of the model to the next.

    Args:
        device: where the model runs.
        timed: number of steps that are timed.

    Attributes:
        host: when the host began each step, in seconds.
        waits: how often the host waited for the device in the ``COUNTED`` steps after the timed ones.
        peak: the most bytes that the tensors had after the warm-up; 0 on a CPU.
    """

    def __init__(self, device: str, timed: int) -> None:
        self.device, self.timed = device, timed
        self.host: list[float] = []
        self.waits = self.peak = 0
        self._events: list[torch.cuda.Event] = []
        self._warned: Any = None

    @property
    def steps(self) -> int:
        """The number of steps that a run needs."""
        return WARM + self.timed + COUNTED + 1

    @torch.compiler.disable
    def tick(self) -> None:
        """Note the start of a step."""
        self.host.append(perf_counter())
        if self.device != "cuda":
            return
        number = len(self.host) - 1
        if number in (WARM, WARM + self.timed):
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        if number == WARM:
            torch.cuda.reset_peak_memory_stats()
        if number == WARM + self.timed:
            self.peak = torch.cuda.max_memory_allocated()
            self._watch()
        if number == WARM + self.timed + COUNTED:
            self._unwatch()

    def _watch(self) -> None:
        # torch warns at each wait. Python shows a warning of one place once, unless it keeps all.
        self._warned = warnings.catch_warnings(record=True)
        self._messages = self._warned.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def _unwatch(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._warned.__exit__(None, None, None)
        self.waits = sum("synchroniz" in str(message.message) for message in self._messages)

    def measured(self) -> dict[str, float]:
        """Return milliseconds per step by the host's clock and the device's, waits per step, and MB.

        Raises:
            RuntimeError: the run had fewer steps, or more.
        """
        if len(self.host) != self.steps:
            raise RuntimeError(f"it took {len(self.host)} steps instead of {self.steps}")
        host = (self.host[WARM + self.timed] - self.host[WARM]) / self.timed * 1e3
        device = host
        if self.device == "cuda":
            torch.cuda.synchronize()
            device = self._events[0].elapsed_time(self._events[1]) / self.timed
        return {
            "host": host, "device": device, "waits": self.waits / COUNTED, "peak": self.peak / 1e6,
        }  # fmt: skip


class Clocked(nn.Module):
    """A model of transformers that returns its loss, and tells a clock of each call."""

    def __init__(self, model: nn.Module, clock: StepClock) -> None:
        super().__init__()
        self.model, self.clock = model, clock

    def forward(self, **batch: Tensor) -> Tensor:
        self.clock.tick()
        return self.model(**batch).loss


@dataclass
class DeviceJob:
    """One run of a model over batches that lie in host memory, pinned where that serves.

    Attributes:
        model: makes the model; ``torch.manual_seed(0)`` goes before.
        batch: makes one batch of a generator.
        device: "cuda" or "cpu".
        timed: number of steps that are timed.
        compile: whether the contestants compile the model.
        units: what is counted in a batch, such as tokens, and how many there are.
        ready: the batches lie on the device from the start.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, Tensor]]
    device: str
    timed: int
    compile: bool
    units: tuple[str, int]
    ready: bool = False
    clocked: Clocked = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.clocked = Clocked(self.model(), StepClock(self.device, self.timed))
        generator = torch.Generator().manual_seed(1)
        kept = [self._placed(self.batch(generator)) for _ in range(4)]
        self.batches = [kept[i % len(kept)] for i in range(self.clocked.clock.steps)]

    def _placed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device != "cuda":
            return batch
        if self.ready:
            return {name: value.to(self.device) for name, value in batch.items()}
        return {name: value.pin_memory() for name, value in batch.items()}

    def optimizer(self) -> torch.optim.Optimizer:
        """Return a fused AdamW over all parameters."""
        return torch.optim.AdamW(self.clocked.parameters(), lr=LR, fused=True)


def gpt2(device: str, timed: int, *, small: bool = False, compile: bool = True) -> DeviceJob:
    """GPT-2 with 124 million parameters, 16 rows of 1,024 tokens; a tiny one where ``small``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if small:
        size |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 96}
    config = GPT2Config(use_cache=False, **size)
    rows = 2 if small else 16

    def batch(generator: torch.Generator) -> dict[str, Tensor]:
        shape = rows, config.n_positions
        ids = torch.randint(config.vocab_size, shape, generator=generator)
        return {"input_ids": ids, "labels": ids}

    units = "tokens", rows * config.n_positions
    return DeviceJob(lambda: GPT2LMHeadModel(config), batch, device, timed, compile, units)


def resnet50(device: str, timed: int, *, small: bool = False, compile: bool = True) -> DeviceJob:
    """ResNet-50, 256 images of 224 by 224 pixels in 1,000 classes; a tiny one where ``small``."""
    from transformers import ResNetConfig, ResNetForImageClassification

    size: dict[str, Any] = {"num_labels": 1000}
    if small:
        size = {"num_labels": 4, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = ResNetConfig(**size)
    images, pixels = (4, 32) if small else (256, 224)

    def batch(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.randn(images, 3, pixels, pixels, generator=generator),
            "labels": torch.randint(config.num_labels, (images,), generator=generator),
        }

    make = ResNetForImageClassification
    return DeviceJob(lambda: make(config), batch, device, timed, compile, ("images", images))


JOBS: dict[str, Callable[..., DeviceJob]] = {"GPT-2 124M": gpt2, "ResNet-50": resnet50}


def flops(job: DeviceJob) -> int:
    """Return the floating-point operations of a step, as torch counts those of its operators."""
    model = job.clocked.model.to(job.device)
    batch = {name: value.to(job.device) for name, value in job.batches[0].items()}
    with FlopCounterMode(display=False) as counter:  # type: ignore[no-untyped-call]
        model(**batch).loss.backward()
    return int(counter.get_total_flops())

"""Cost of a training step on one GPU, for loopkit and a loop by hand; runs the GPU tests first.

    pip install -e '.[dev]'
    python benchmarks/gpu.py       # a few minutes
    python benchmarks/gpu.py --device cpu --rounds 2 --skip-tests

All contestants train a GPT in bfloat16 autocast with fused AdamW, from the same weights on the same
batches. Host time is the time to submit a step; no step waits for the device. Device time comes
from CUDA events around all steps of a run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import record
from benchmarks.overhead import quiet
from benchmarks.strategies import Gpt
from loopkit import DDP, FSDP, DeepSpeed, Fit, Task
from loopkit.optim import AdamW

STEPS, WARM, BATCH, LENGTH = 60, 10, 32, 256


class Language(Task):
    """The GPT on prepared batches. It records the time of each step."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Gpt()
        generator = torch.Generator().manual_seed(1)
        self.batches = [
            torch.randint(0, 96, (BATCH, LENGTH), generator=generator) for _ in range(STEPS)
        ]
        self.clock = Clock(device)

    def train_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.clock.tick()
        return self.model(batch)

    def optimizers(self) -> Any:
        return AdamW(lr=1e-3)

    def train_data(self) -> Any:
        return self.batches


class Clock:
    """Records host time at every step, and device time at two of them."""

    def __init__(self, device: str) -> None:
        self.cuda, self.host, self.events = device == "cuda", [], []

    def tick(self) -> None:
        """Record the start of a step."""
        self.host.append(perf_counter())
        if self.cuda and len(self.host) in (WARM, STEPS):
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()

    def per_step(self) -> dict[str, float]:
        """Return milliseconds per step after the warm-up."""
        count = STEPS - WARM
        host = (self.host[STEPS - 1] - self.host[WARM - 1]) / count * 1e3
        if not self.cuda:
            return {"host": host, "device": host}
        torch.cuda.synchronize()
        return {"host": host, "device": self.events[0].elapsed_time(self.events[1]) / count}


def by_hand(device: str) -> dict[str, float]:
    """Run the hand-written loop, with pinned batches and non-blocking copies."""
    task = Language(device).to(device)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3, fused=True)
    for batch in task.batches:
        ids = (batch.pin_memory() if device == "cuda" else batch).to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16):
            loss = task.train_step(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return task.clock.per_step()


def ours(make: Callable[[], Any]) -> Callable[[str], dict[str, float]]:
    """Return a contestant: Fit with its defaults, without logs and files."""

    def train(device: str) -> dict[str, float]:
        task = Language(device)
        options: dict[str, Any] = {
            "loggers": None,
            "progress": False,
            "checkpoint": False,
            "log_every": "never",
        }
        with tempfile.TemporaryDirectory() as folder, quiet():
            Fit(
                strategy=make(), accelerator=device, precision="bf16", run_dir=folder, **options
            ).run(task)
        return task.clock.per_step()

    return train


CONTESTANTS: dict[str, Callable[[str], dict[str, float]]] = {
    "by hand": by_hand,
    "loopkit": ours(lambda: "single"),
    "loopkit DDP": ours(DDP),
    "loopkit FSDP": ours(FSDP),
    "loopkit DeepSpeed 2": ours(lambda: DeepSpeed(stage=2)),
}


def main() -> None:
    """Run the tests, measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="Milliseconds per step on one GPU, side by side.")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: %(default)s)")
    parser.add_argument("--skip-tests", action="store_true", help="measure alone")
    args = parser.parse_args()
    passed: bool | None = None
    if not args.skip_tests:
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/gpu",
            "tests/checkpoint/test_background.py",
        ]
        passed = subprocess.run(words, cwd=record.ROOT).returncode == 0
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for number in range(args.rounds + 1):
        for name, train in list(CONTESTANTS.items()):
            if name not in found:
                continue
            try:
                times = train(args.device)
            except Exception as error:
                print(
                    f"left out: {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr
                )
                del found[name]
                continue
            if number:
                found[name].append(times)
    rows = {}
    for name, runs in found.items():
        base = [run["device"] for run in found["by hand"]]
        rows[name] = {
            kind: record.quartiles([run[kind] for run in runs]) for kind in ("host", "device")
        }
        rows[name]["ratio"] = record.quartiles(
            [run["device"] / best for run, best in zip(runs, base)]
        )
    print(f"{'':22}{'host ms':>10}{'device ms':>12}{'ratio':>8}")
    for name, row in rows.items():
        print(
            f"{name:22}{row['host']['median']:10.2f}{row['device']['median']:12.2f}{row['ratio']['median']:8.3f}"
        )
    if args.device == "cuda":
        about = {
            "gpu": torch.cuda.get_device_name(),
            "tests_passed": passed,
            "rounds": args.rounds,
            "steps": STEPS,
        }
        record.save(
            "gpu",
            {
                **about,
                "versions": record.versions(("torch", "loopkit-torch", "deepspeed")),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()

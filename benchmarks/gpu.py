"""Training on one GPU, for loopkit, a loop by hand and the peers; runs the GPU tests first.

    pip install -e '.[dev]'
    python benchmarks/gpu.py       # under nine minutes
    python benchmarks/gpu.py --device cpu --small --rounds 2 --skip-tests

First a small GPT under each strategy: the kernels are short, so the time of the framework shows.
Then GPT-2 124M and ResNet-50, compiled, beside the peers: time, tokens or images per second, MFU,
peak memory, and how often the host waits for the device in a step. Last: what a save in the
background costs, what the copy of a batch costs, and whether ``loopkit plan`` finds the real peak.

All contestants train in bfloat16 autocast with fused AdamW, from the same weights on the same
batches. Host time is the time to submit a step. Device time comes from CUDA events around all steps
of a run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import record
from benchmarks.device import measures
from benchmarks.device.jobs import JOBS
from benchmarks.overhead import quiet
from benchmarks.strategies import Gpt
from loopkit import DDP, FSDP, DeepSpeed, Fit, Task
from loopkit.optim import AdamW

STEPS, WARM = 60, 10
PACKAGES = ("torch", "loopkit-torch", "lightning", "transformers", "accelerate", "deepspeed")


class Language(Task):
    """The GPT on prepared batches. It records the time of each step."""

    def __init__(self, device: str, small: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.accelerator = Gpt(), device
        generator = torch.Generator().manual_seed(1)
        shape = (2, 16) if small else (32, 256)
        self.batches = [torch.randint(0, 96, shape, generator=generator) for _ in range(STEPS)]
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


def by_hand(task: Language) -> dict[str, float]:
    """Run the hand-written loop, with pinned batches and non-blocking copies."""
    device = task.accelerator
    task.to(device)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3, fused=True)
    for batch in task.batches:
        ids = (batch.pin_memory() if device == "cuda" else batch).to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16):
            loss = task.train_step(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return task.clock.per_step()


def ours(make: Callable[[], Any]) -> Callable[[Language], dict[str, float]]:
    """Return a contestant: Fit with its defaults, without logs and files."""

    def train(task: Language) -> dict[str, float]:
        options: dict[str, Any] = {
            "loggers": None,
            "progress": False,
            "checkpoint": False,
            "log_every": "never",
        }
        with tempfile.TemporaryDirectory() as folder, quiet():
            Fit(
                strategy=make(),
                accelerator=task.accelerator,
                precision="bf16",
                run_dir=folder,
                **options,
            ).run(task)
        return task.clock.per_step()

    return train


CONTESTANTS: dict[str, Callable[[Language], dict[str, float]]] = {
    "by hand": by_hand,
    "loopkit": ours(lambda: "single"),
    "loopkit DDP": ours(DDP),
    "loopkit FSDP": ours(FSDP),
    "loopkit DeepSpeed 2": ours(lambda: DeepSpeed(stage=2)),
}


def strategies(device: str, small: bool, rounds: int) -> dict[str, Any]:
    """Return the times of a step of the small GPT by contestant, and print them."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds + 1):
        for name, train in list(CONTESTANTS.items()):
            if name not in found:
                continue
            try:
                times = train(Language(device, small))
            except Exception as error:
                told = f"left out: {name}: {type(error).__name__}: {str(error)[:200]}"
                print(told, file=sys.stderr)
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
        host, on_device, ratio = (row[kind]["median"] for kind in ("host", "device", "ratio"))
        print(f"{name:22}{host:10.2f}{on_device:12.2f}{ratio:8.3f}", flush=True)
    return rows


def models(device: str, small: bool, until: float, rounds: int) -> dict[str, Any]:
    """Return and print what ``measures`` finds of the known models."""
    timed, fewer = (4, 1) if small else (60, 2)
    speeds: dict[str, Any] = {}
    jobs = {
        name: partial(make, device, timed, small=small, compile=not small)
        for name, make in JOBS.items()
    }
    for number, (name, job) in enumerate(jobs.items()):
        share = monotonic() + 0.7 * (until - monotonic()) / (len(jobs) - number)
        found = speeds[name] = measures.speeds(job, share, rounds)
        print(f"\n{name}, {found['rounds']} runs of each")
        head = f"{found['unit']}/s"
        print(f"{'':22}{'ms':>10}{'ratio':>8}{head:>12}{'MFU':>7}{'MB':>9}{'waits':>7}")
        for contestant, row in found["rows"].items():
            told = (
                f"{contestant:22}{row['device']:10.2f}{row['ratio']:8.3f}{row['per_second']:12.0f}"
            )
            told += f"{row.get('mfu', 0):7.2f}{row['peak']:9.0f}{row['waits']:7.2f}"
            print(told, flush=True)
    gpt2, resnet = jobs.values()
    result: dict[str, Any] = {"speeds": speeds}
    result["save"] = measures.save_stall(gpt2, fewer)
    print(
        "\na save in the background: {stall:.1f} ms for {megabytes:.0f} MB".format(**result["save"])
    )
    result["copies"] = measures.copies_ahead(resnet, fewer)
    print("a step with its copy, against batches on the device:", result["copies"])
    result["plan"] = measures.planned_memory(partial(gpt2.func, small=small), device)
    print("peak, MB: {planned:.0f} planned, {measured:.0f} measured".format(**result["plan"]))
    return result


def main() -> None:
    """Run the tests, measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="Training on one GPU, side by side.")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: %(default)s)")
    parser.add_argument("--skip-tests", action="store_true", help="measure alone")
    parser.add_argument("--small", action="store_true", help="tiny models, not compiled")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time for all, roughly (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    until = monotonic() + 60 * args.minutes
    passed: bool | None = None
    if not args.skip_tests:
        files = ["tests/gpu", "tests/checkpoint/test_background.py"]
        words = [sys.executable, "-m", "pytest", "-q", *files]
        passed = subprocess.run(words, cwd=record.ROOT).returncode == 0
    result = {
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "tests_passed": passed,
        "rounds": args.rounds,
        "steps": STEPS,
        "versions": record.versions(PACKAGES),
        "rows": strategies(args.device, args.small, args.rounds),
    }
    if args.device == "cuda":  # what follows may be cut short
        record.save("gpu", result)
    result["models"] = models(args.device, args.small, until, args.rounds)
    if args.device == "cuda":
        record.save("gpu", result)


if __name__ == "__main__":
    main()

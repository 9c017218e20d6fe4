"""What is measured of the jobs: speed beside the peers, a save, copies ahead, and planned memory."""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import torch

from benchmarks import record
from benchmarks.device.contestants import CONTESTANTS, DeviceTask, loopkit
from benchmarks.device.jobs import DeviceJob, flops
from benchmarks.overhead import quiet
from loopkit import Checkpoint
from loopkit.options import Options
from loopkit.plan.planned import planned_run

BASE = "by hand"
# Floating-point operations per second in dense bfloat16, from NVIDIA's data sheets.
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
SAVES = 4

Make = Callable[..., DeviceJob]


def once(job: DeviceJob, train: Callable[[DeviceJob], None]) -> dict[str, float]:
    """Return what the clock of a run measured. Compiled code of earlier runs is forgotten first."""
    torch._dynamo.reset()
    gc.collect()
    if job.device == "cuda":
        torch.cuda.empty_cache()
    with quiet():
        train(job)
    return job.clocked.clock.measured()


def speeds(make: Callable[[], DeviceJob], until: float, rounds: int) -> dict[str, Any]:
    """Measure each contestant in turns: ``rounds`` times, or fewer when ``until`` has come.

    Args:
        make: makes the job.
        until: a time of ``time.monotonic``, after which no round begins; there is at least one.
        rounds: the most rounds.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        if number and monotonic() > until:
            break
        for name in record.rotated(found, number):
            try:
                found[name].append(once(make(), CONTESTANTS[name]))
            except Exception as error:
                if name in (BASE, "loopkit"):
                    raise
                told = f"left out: {name}: {type(error).__name__}: {str(error)[:200]}"
                print(told, file=sys.stderr)
                del found[name]
    job = make()
    unit, count = job.units
    work = flops(job)
    rows: dict[str, Any] = {}
    for name, runs in found.items():
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        ratios = [run["device"] / best["device"] for run, best in zip(runs, found[BASE])]
        per_second = count / middle["device"] * 1e3
        rows[name] = {**middle, "ratio": median(ratios), "per_second": per_second}
        for card, peak in PEAK_FLOPS.items():
            if job.device == "cuda" and card in torch.cuda.get_device_name():
                rows[name]["mfu"] = work / middle["device"] * 1e3 / peak
    return {"unit": unit, "flops": work, "rounds": len(found[BASE]), "rows": rows}


def save_stall(make: Callable[[], DeviceJob], rounds: int) -> dict[str, float]:
    """Return by how many milliseconds a background save lengthens a run, and its size in MB."""
    stalls, size = [], 0.0
    for _ in range(rounds):
        plain = once(make(), loopkit)
        job = make()
        every = max(1, job.timed // SAVES)
        with tempfile.TemporaryDirectory() as folder:
            # The first save falls into the warm-up, and allocates its copies there.
            settings = Checkpoint(every=f"{every} steps", keep=1, background=True)
            saved = once(job, partial(loopkit, checkpoint=settings, run_dir=folder))
            newest = max(Path(folder, "checkpoints").glob("step-*"))
            size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / 1e6
        stalls.append((saved["device"] - plain["device"]) * job.timed / (job.timed // every))
    return {"stall": median(stalls), "megabytes": size}


def copies_ahead(make: Callable[[], DeviceJob], rounds: int) -> dict[str, float]:
    """Return what a step with copied batches takes against one whose batches lie on the device."""
    ratios: dict[str, list[float]] = {BASE: [], "loopkit": []}
    for _ in range(rounds):
        for name, found in ratios.items():
            copied = once(make(), CONTESTANTS[name])["device"]
            ready = once(replace(make(), ready=True), CONTESTANTS[name])["device"]
            found.append(copied / ready)
    return {name: median(found) for name, found in ratios.items()}


def planned_memory(make: Callable[..., DeviceJob], device: str) -> dict[str, float]:
    """Return the peak of a step that a plan gives and the one measured, in MB; 0 for none on a CPU."""

    def task() -> DeviceTask:
        return DeviceTask(make("cpu", 2, compile=False))

    with quiet(), planned_run(task, Options(precision="bf16")) as plan:
        planned = plan.peak().total / 1e6
    measured = once(make(device, 4, compile=False), loopkit)["peak"]
    return {"planned": planned, "measured": measured}

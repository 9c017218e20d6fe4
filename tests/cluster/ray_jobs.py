"""Functions that Ray runs: training as in the other cluster tests, and what is refused there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from loopkit import Fit, rank_zero_first
from loopkit.errors import OptionError
from loopkit.hooks import RayReport
from tests.cluster import train
from tests.support import Tiny, quiet


def note(folder: Path, name: str, value: Any) -> None:
    """Keep a value for the test, under a name of its own on each rank and in each attempt."""
    rank = os.environ.get("RANK", "0")
    number = len(list(folder.glob(f"{name}-{rank}-*")))
    path = folder / f".{name}-{rank}-{number}"
    path.write_text(json.dumps(value))
    path.rename(folder / path.name[1:])


def noted(folder: Path, name: str) -> list[Any]:
    """Return the values under a name, by rank and attempt."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*"))]


def training(config: dict[str, Any]) -> None:
    """Train; note each attempt's process, and what came of it."""
    folder = Path(config["folder"])
    note(folder, "pid", os.getpid())
    resume = "auto"
    if config.get("from_ray"):
        import ray.train

        resume = ray.train.get_checkpoint()
        note(folder, "from", "" if resume is None else resume.path)
    words = [f"{name}={value}" for name, value in config.get("given", {}).items()]
    options = {"resume": resume, "run_dir": config.get("run_dir"), **config.get("options", {})}
    outcome = train.main("", *words, hooks=[RayReport()], **options)
    note(folder, "outcome", outcome)


def refused(config: dict[str, Any]) -> None:
    """Note the error of each Fit that this place cannot run."""
    folder = Path(config["folder"])
    for name, options in config["cases"].items():
        hooks = [RayReport()] if options.pop("reports", False) else []
        try:
            quiet(steps=1, accelerator="cpu", hooks=hooks, **options).run(Tiny())
        except OptionError as error:
            note(folder, name, str(error))


def exporting(config: dict[str, Any]) -> None:
    """Train; then use what all ranks do outside of a run."""
    folder = Path(config["folder"])
    result = Fit(
        steps=4, progress=False, accelerator="cpu", run_dir=folder / "run", hooks=[RayReport()]
    ).run(Tiny())
    exported = result.export(folder / "export")
    with rank_zero_first():
        note(folder, "entered", time.monotonic())
        time.sleep(0.2)
    note(folder, "exported", sorted(path.name for path in exported.iterdir()))


def trial(config: dict[str, Any]) -> None:
    """Train in a trial of Ray Tune, which gets evaluations and checkpoints."""
    import ray.tune

    fit = quiet(epochs=2, checkpoint=True, resume=ray.tune.get_checkpoint(), hooks=[RayReport()])
    fit.run(Tiny(lr=config["lr"]))

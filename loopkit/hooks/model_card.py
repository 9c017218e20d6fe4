"""The model card of a repository: what was trained, how, with what result, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from loopkit.loggers.serialize import flatten
from loopkit.options import Options
from loopkit.task import name_of
from loopkit.version import __version__

if TYPE_CHECKING:
    from loopkit.run import Run

MARK = "<!-- written by loopkit: without this line the page is left alone -->"
_OMITTED = ("hooks", "loggers", "progress", "resume", "run_dir", "checkpoint")


def model_card(
    run: Run, repo: str, step: int, metrics: Mapping[str, float], checkpoint: str | None
) -> str:
    """Return the README.md of a repository: front matter for the hub, then Markdown.

    Args:
        run: the run that trained the model.
        repo: "user/name" or "name".
        step: the step of the weights.
        metrics: of these weights, by full name.
        checkpoint: the folder of a whole checkpoint in the repository; None without one.
    """
    name, progress = name_of(run.task), run.progress
    facts = {
        "task": name,
        "optimizer steps": step,
        "epochs": f"{progress.epoch}",
        "samples": progress.samples,
        "parameters": sum(p.numel() for p in run.task.parameters()),
        "strategy": f"{run.strategy.name} on {run.strategy.world_size} device(s)",
        "precision": run.strategy.settings.precision.name,
        "seed": run.options.seed,
        "loopkit": __version__,
        "torch": str(torch.__version__),
    }
    defaults = Options().to_dict()
    options = {
        name: value
        for name, value in run.options.to_dict().items()
        if value != defaults[name] and name not in _OMITTED
    }
    parts = [
        "---",
        "library_name: loopkit",
        "tags:",
        "- loopkit",
        "---",
        MARK,
        "",
        f"# {repo.rpartition('/')[2]}",
        "",
        f"`{name}`, trained with loopkit.",
        "",
        *_table("run", facts),
    ]
    if metrics:
        parts += ["", "## Metrics", "", *_table("metric", metrics)]
    if task_hparams := flatten(run.task.hparams):
        parts += ["", "## Hyperparameters", "", *_table("argument of the task", task_hparams)]
    if options:
        table = _table("option of Fit, where not the default", flatten(options))
        parts += ["", "## Options", "", *table]
    parts += ["", "## Use", "", "```python", *_example(name, repo, checkpoint), "```", ""]
    return "\n".join(parts)


def _table(title: str, values: Mapping[str, Any]) -> list[str]:
    def cell(value: Any) -> str:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    return [
        f"| {title} | |",
        "|---|---|",
        *(f"| {cell(name)} | {cell(value)} |" for name, value in values.items()),
    ]


def _example(name: str, repo: str, checkpoint: str | None) -> list[str]:
    """Return the lines of Python that load the model."""
    lines = [
        "from huggingface_hub import snapshot_download",
        f"folder = snapshot_download({repo!r})",
    ]
    if checkpoint is not None:
        load = f"task = {name}.load(f'{{folder}}/{checkpoint}')"
        return [*lines, f"{load}  # or train on from it, with Fit(resume=...)"]
    return [
        "from safetensors.torch import load_file",
        *lines,
        "",
        f"task = {name}(...)  # the arguments stand above, and in loopkit.json",
        "task.load_state_dict(load_file(f'{folder}/model.safetensors'))",
    ]

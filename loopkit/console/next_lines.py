"""What a person can type after a run: to continue it, to evaluate, to predict, to load the model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from loopkit.checkpoint import tools
from loopkit.task import name_of, overrides

if TYPE_CHECKING:
    from loopkit.run import Run

COMMAND_FILE = "command.json"


def typed_target(run_dir: Path) -> str | None:
    """Return the target of the command that started a run; None if a program started it."""
    try:
        return str(json.loads((run_dir / COMMAND_FILE).read_text(encoding="utf-8"))["target"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def continue_line(run_dir: Path, url: str | None = None) -> str:
    """Return how to continue the run in ``run_dir``, the local copy of ``url`` if that is given."""
    place = url or str(run_dir)
    if typed_target(run_dir) is not None:
        return f"To continue: loopkit resume {shlex.quote(place)}"
    return f"To continue: the same with Fit(run_dir={place!r}, resume='auto')"


def where_it_is_left(run: Run) -> list[str]:
    """Return lines about a run that was left in the middle of a step."""
    left = f"Left in step {run.progress.step + 1:,}, which is not saved"
    entries = [] if run.run_dir is None else tools.list_checkpoints(run.run_dir)
    saved = [entry.path for entry in entries if not entry.problem]
    if run.run_dir is None or not saved:
        return [f"{left}; there is no checkpoint"]
    return [
        f"{left}; the newest checkpoint is {saved[-1]}",
        continue_line(run.run_dir, run.options.url),
    ]


def next_lines(run: Run) -> dict[str, str]:
    """Return lines to type after a run, by what they do; nothing if it saved nothing.

    They use the best checkpoint if the run knows it, or else the newest.
    """
    newest = None if run.checkpointer is None else run.checkpointer.newest
    if run.run_dir is None or newest is None:
        return {}
    best = run.record.best.get("checkpoint")
    place = run.options.url or str(run.run_dir)
    path = place
    if best is not None and best != newest:
        path += f"/{best.relative_to(run.run_dir).as_posix()}"
    task, target = name_of(run.task), typed_target(run.run_dir)
    load = f"{task}.load({path!r})"
    if target is None:
        lines = {"evaluate": f"Fit().evaluate({load})", "predict": f"Fit().predict({load})"}
    else:
        typed = f"{shlex.quote(target)} --checkpoint {shlex.quote(path)}"
        lines = {
            "evaluate": f"loopkit evaluate {typed}",
            "predict": f"loopkit predict {typed}",
        }
    wanted = {"evaluate": bool(run.eval_data), "predict": overrides(run.task, "predict_step")}
    return {name: line for name, line in lines.items() if wanted[name]} | {"load": load}

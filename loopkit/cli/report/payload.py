"""All that the page of a run shows, as JSON values."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from typing import Any

from loopkit.checkpoint import tools
from loopkit.cli.report.run_data import (
    AXES,
    RunData,
    differing,
    is_number,
    is_quality,
    same_but_seed,
    short_names,
)
from loopkit.cli.report.series import curves
from loopkit.console.next_lines import typed_target
from loopkit.loggers.serialize import jsonable
from loopkit.options import Options
from loopkit.version import __version__

_ABOUT = (
    "task", "reason", "started", "ended", "updated", "command", "directory", "host", "devices", "strategy",
    "precision", "commit", "versions", "parameters", "progress", "total_steps", "timings", "peak_memory",
    "class_names",
)  # fmt: skip
_ENDED_EARLY = ("killed", "interrupted", "stopped", "failed")


def payload(runs: Sequence[RunData], *, live: bool = False) -> dict[str, Any]:
    """Return what a page about ``runs`` shows.

    Args:
        runs: in the order of the page.
        live: whether the page asks for newer values.
    """
    names = short_names(run.path for run in runs)
    found: dict[str, Any] = jsonable_finite(
        {
            "version": __version__,
            "made": time.time(),
            "live": live,
            "defaults": Options().to_dict(),
            "differing": differing(runs) if len(runs) > 1 else [],
            "groups": same_but_seed(runs),
            "runs": [_run(run, name) for run, name in zip(runs, names)],
        }
    )
    return found


def jsonable_finite(value: Any) -> Any:
    """Return ``value`` without NaN and infinities, which become strings; lists of any length stay."""
    if isinstance(value, dict):
        return {str(name): jsonable_finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [jsonable_finite(part) for part in value]
    return jsonable(value)


def _run(run: RunData, name: str) -> dict[str, Any]:
    axes, drawn = curves(run)
    monitor, best = run.monitor, run.best
    return {
        **{key: run.about.get(key) for key in _ABOUT},
        "name": name,
        "path": run.place,
        "status": run.status,
        "step": run.step,
        "seconds": run.seconds,
        "evaluating": sum(row.get("eval/runtime", 0.0) for row in run.evaluations),
        "commands": _commands(run),
        "attempts": run.attempts,
        "monitor": {"name": monitor.name, "mode": monitor.mode},
        "best": None if best is None else {"step": best["step"], "value": best[monitor.name]},
        "last": {key: value for key, value in run.last.items() if is_quality(key)},
        "options": run.options,
        "hparams": run.hparams,
        "settings": run.settings,
        "axes": axes,
        "curves": drawn,
        "evaluations": [
            {key: value for key, value in row.items() if key == "step" or key not in AXES}
            for row in run.evaluations
        ],
        "arrays": _arrays(run),
        "checkpoints": [
            {
                "name": entry.path.name,
                "step": entry.step,
                "bytes": entry.size,
                "kind": entry.kind,
                "metrics": {key: value for key, value in entry.metrics.items() if is_quality(key)},
                "problem": entry.problem,
            }
            for entry in tools.list_checkpoints(run.path)
        ],
    }


def _commands(run: RunData) -> dict[str, str]:
    """Return what to type to continue and to evaluate a run that the command line started."""
    target, place = typed_target(run.path), shlex.quote(run.place)
    if target is None:
        return {}
    found = {"evaluate": f"loopkit evaluate {shlex.quote(target)} --checkpoint {place}"}
    if run.status in _ENDED_EARLY:
        found["continue"] = f"loopkit resume {place}"
    return found


def _arrays(run: RunData) -> list[dict[str, Any]]:
    """Return the square matrices and the vectors of the best evaluation, or else of the last."""
    found: dict[str, dict[str, Any]] = {}
    best = None if run.best is None else run.best["step"]
    for row in run.arrays:
        for name, value in row.items():
            kind = _kind(value)
            known = found.get(name)
            if kind and (known is None or known["step"] != best):
                found[name] = {"name": name, "step": row["step"], "kind": kind, "value": value}
    for each in found.values():
        each["best"] = each["step"] == best
    return list(found.values())


def _kind(value: Any) -> str:
    if not isinstance(value, list) or len(value) < 2:
        return ""
    if all(is_number(part) for part in value):
        return "vector"
    square = all(isinstance(part, list) and len(part) == len(value) for part in value)
    return "matrix" if square and all(is_number(x) for part in value for x in part) else ""

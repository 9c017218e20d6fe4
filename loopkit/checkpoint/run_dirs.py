"""What a directory holds that was given as a run or a checkpoint."""

from __future__ import annotations

from pathlib import Path

from loopkit.checkpoint.format import checkpoints_dir

_MOST = 8


def runs_in(directory: Path) -> list[Path]:
    """Return the runs right below a directory: those with checkpoints, by number or name."""
    found = [each for each in directory.iterdir() if checkpoints_dir(each).is_dir()]
    return sorted(found, key=lambda each: (not each.name.isdigit(), each.name.zfill(12)))


def no_run_in(directory: Path) -> str:
    """Return an error text that names the runs below ``directory``; "" if there are none."""
    if not directory.is_dir() or checkpoints_dir(directory).is_dir():
        return ""
    return holds_runs(directory, [str(each) for each in runs_in(directory)])


def holds_runs(place: Path | str, names: list[str]) -> str:
    """Return an error text for a place that is no run, and holds these; "" if there are none."""
    if not names:
        return ""
    shown = [*names[:_MOST], f"and {len(names) - _MOST} more"] if len(names) > _MOST else names
    return f"{place} is no run, and holds {len(names)}: name one of {', '.join(shown)}"

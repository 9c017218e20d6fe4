"""The report of one run, or of several side by side, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopkit.checkpoint import tools
from loopkit.cli.ckpt import checkpoint_table
from loopkit.cli.report.run_data import (
    AXES,
    RunData,
    differing,
    is_number,
    is_quality,
    read_run,
    short_names,
)
from loopkit.cli.report.run_table import run_table
from loopkit.console.text import columns, cut, duration, number
from loopkit.options import Options

MOST_EVALUATIONS = 12
LONGEST_VALUE = 120


def report(run_dir: Path, *, everything: bool = False) -> str:
    """Return the report of one run.

    Args:
        run_dir: its directory.
        everything: show all evaluations.

    Raises:
        LoopkitError: the directory holds nothing that a run writes.
    """
    run = read_run(run_dir)
    checkpoints = tools.list_checkpoints(run_dir)
    blocks = [
        _head(run),
        _attempts(run),
        _training(run.rows),
        _evaluations(run, everything),
        _timings(run),
        ["checkpoints", *_indent(checkpoint_table(checkpoints))]
        if checkpoints
        else ["no checkpoints"],
        ["files", *_indent(_files(run))],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def comparison(runs: Sequence[RunData]) -> str:
    """Return several runs side by side: a table of them, and what differs between them."""
    names = short_names(run.path for run in runs)
    blocks = [["runs", *_indent(run_table(runs, names))]]
    changed = differing(runs)
    if changed:
        table = [["", *names]]
        for name in changed:
            values = (run.settings.get(name, "-") for run in runs)
            table.append([name, *(cut(str(value), LONGEST_VALUE) for value in values)])
        blocks.append(["settings that differ", *_indent(columns(table, [False] * len(table[0])))])
    else:
        blocks.append(["all settings are equal"])
    measured = sorted({name for run in runs for name in run.last if name.startswith("eval/")})
    measured = [name for name in measured if is_quality(name)]
    if measured:
        table = [["last evaluation", *names]]
        for name in measured:
            shown = [number(run.last[name]) if name in run.last else "-" for run in runs]
            table.append([name, *shown])
        blocks.append(columns(table, [False, *(True for _ in runs)]))
    return "\n\n".join("\n".join(block) for block in blocks)


def changed_settings(run: RunData) -> dict[str, Any]:
    """Return the options that have not their defaults."""
    defaults = Options().to_dict()
    return {
        name: value
        for name, value in run.options.items()
        if name not in defaults or defaults[name] != value
    }


def _head(run: RunData) -> list[str]:
    about = run.about
    lines = [["run", run.place], ["task", str(about.get("task", "unknown"))]]
    if "status" in about:
        reason = f": {about['reason']}" if about.get("reason") else ""
        lines.append(["status", f"{run.status}{reason}"])
        seconds = "" if run.seconds is None else f", {duration(run.seconds)} of training"
        lines.append(["started", f"{about.get('started')}{seconds}"])
        devices = about.get("devices") or {}
        ranks = f" x {devices['ranks']}" if devices.get("ranks", 1) > 1 else ""
        lines.append(
            [
                "on",
                f"{devices.get('device')}{ranks} of {about.get('host')}, {about.get('precision')}",
            ]
        )
        commit = about.get("commit")
        if commit:
            clean = "" if commit.get("clean") else ", with changes"
            lines.append(["commit", f"{str(commit.get('id'))[:12]}{clean}"])
        if about.get("command"):
            lines.append(["command", cut(str(about["command"]), LONGEST_VALUE)])
    lines += _pairs("arguments", run.hparams)
    lines += _pairs("options", changed_settings(run))
    if run.rows:
        epochs = [row["epoch"] for row in run.rows if is_number(row.get("epoch"))]
        epoch = f", epoch {epochs[-1]:g}" if epochs else ""
        lines.append(["last row", f"step {run.rows[-1]['step']:,}{epoch}"])
    return columns(lines, [False, False])


def _pairs(title: str, values: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each value, with the title in the first one."""
    shown = [cut(f"{name} = {value}", LONGEST_VALUE) for name, value in values.items()]
    return [[title if at == 0 else "", text] for at, text in enumerate(shown)]


def _attempts(run: RunData) -> list[str]:
    """Return how each attempt ended, where there was more than one, and what was warned of."""
    warned = [each["text"] for attempt in run.attempts for each in attempt.get("warnings") or ()]
    lines = []
    if len(run.attempts) > 1:
        table = [["attempt", "started", "steps", "ended by"]]
        for at, attempt in enumerate(run.attempts, 1):
            reason = f": {attempt['reason']}" if attempt.get("reason") else ""
            steps = f"{attempt.get('from_step', 0):,} to {attempt.get('to_step', 0):,}"
            table.append(
                [str(at), str(attempt.get("started")), steps, f"{attempt['status']}{reason}"]
            )
        lines += columns(table, [True, False, False, False])
    if warned:
        lines += [
            "warnings",
            *_indent([cut(text, LONGEST_VALUE) for text in dict.fromkeys(warned)]),
        ]
    return lines


def _training(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the first, lowest, highest and last value of everything logged in training."""
    names = sorted({name for row in rows for name in row if name.startswith("train/")})
    table = [["train", "first", "lowest", "highest", "last"]]
    for name in names:
        values = [row[name] for row in rows if is_number(row.get(name))]
        if values:
            known = [value for value in values if value == value] or values
            shown = (values[0], min(known), max(known), values[-1])
            table.append([name, *map(number, shown)])
    return columns(table, [False, True, True, True, True]) if len(table) > 1 else []


def _evaluations(run: RunData, everything: bool) -> list[str]:
    measured, monitor = run.evaluations, run.monitor
    if not measured:
        return ["no evaluations"]
    names = {name for row in measured for name in row if is_quality(name)}
    shown_names = sorted(names - set(AXES))
    best = next(iter(monitor.ranked(measured, lambda row: row)), None)
    shown = measured if everything else measured[-MOST_EVALUATIONS:]
    if best is not None and not any(row is best for row in shown):
        shown = [best, *shown[1:]]
    table = [["step", *shown_names, ""]]
    for row in shown:
        values = [row.get(name) for name in shown_names]
        cells = [number(value) if isinstance(value, (int, float)) else "-" for value in values]
        table.append([f"{row['step']:,}", *cells, f"best {monitor.name}" if row is best else ""])
    title = f"evaluations: {len(measured)}"
    if len(shown) < len(measured):
        title += f", the last {len(shown)} (--all shows them all)"
    return [title, *_indent(columns(table, [*(True for _ in table[0][1:]), False]))]


def _timings(run: RunData) -> list[str]:
    """Return the time of a step by part."""
    timings = dict(run.about.get("timings") or {})
    whole = timings.pop("step", 0)
    if not whole:
        return []
    table = [[name, f"{us:,.0f} µs", f"{us / whole:.0%}"] for name, us in timings.items()]
    return ["time per step", *_indent(columns(table, [False, True, True]))]


def _files(run: RunData) -> list[str]:
    found = [path for path in sorted(run.path.iterdir()) if not path.name.startswith(".")]
    return [f"{run.place}/{path.name}{'/' if path.is_dir() else ''}" for path in found]


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]

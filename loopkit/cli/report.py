"""``loopkit report RUN_DIR``: show what a run did, from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopkit.checkpoint import tools
from loopkit.cli.args.command_parser import CommandParser
from loopkit.cli.ckpt import SPEED, checkpoint_table
from loopkit.console.text import columns, cut, number
from loopkit.errors import LoopkitError
from loopkit.loggers.jsonl import read_rows
from loopkit.monitor import Monitor
from loopkit.options import Options

MOST_EVALUATIONS = 12
LONGEST_VALUE = 120


def run(argv: Sequence[str]) -> int:
    """Print the report of a run; return the exit code."""
    parser = CommandParser(
        "report", "Show what a run did: its evaluations, the best one, checkpoints and files."
    )
    parser.add_argument("run_dir", type=Path, help="the directory of the run")
    parser.add_argument(
        "--all", action="store_true", help=f"show more than {MOST_EVALUATIONS} evaluations"
    )
    given = parser.parse_args(argv)
    if not given.run_dir.is_dir():
        raise LoopkitError(f"there is no run directory {given.run_dir}")
    print(report(given.run_dir, everything=given.all))
    return 0


def report(run_dir: Path, *, everything: bool = False) -> str:
    """Return the report as text.

    Raises:
        LoopkitError: the directory holds nothing that a run writes.
    """
    about = _read_about(run_dir)
    path = run_dir / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    checkpoints = tools.list_checkpoints(run_dir)
    if not about and not rows and not checkpoints:
        raise LoopkitError(
            f"{run_dir} holds no run: there is no metrics.jsonl, hparams.json or checkpoints in it"
        )
    blocks = [
        _head(run_dir, about, rows),
        _training(rows),
        _evaluations(rows, _monitor(about), everything),
        ["checkpoints", *_indent(checkpoint_table(checkpoints))]
        if checkpoints
        else ["no checkpoints"],
        ["files", *_indent(_files(run_dir))],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _read_about(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "hparams.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LoopkitError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _head(run_dir: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    defaults = Options().to_dict()
    options = about.get("options", {}).items()
    changed = {n: value for n, value in options if n not in defaults or defaults[n] != value}
    lines = [["run", str(run_dir)], ["task", str(about.get("task", "unknown"))]]
    lines += _pairs("arguments", about.get("hparams", {}))
    lines += _pairs("options", changed)
    if rows:
        epochs = [row["epoch"] for row in rows if "epoch" in row]
        epoch = f", epoch {epochs[-1]:g}" if epochs and epochs[-1] is not None else ""
        lines.append(["last row", f"step {rows[-1]['step']:,}{epoch}"])
    return columns(lines, [False, False])


def _pairs(title: str, values: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each value, with the title in the first one."""
    shown = [cut(f"{name} = {value}", LONGEST_VALUE) for name, value in values.items()]
    return [[title if at == 0 else "", text] for at, text in enumerate(shown)]


def _training(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the first, lowest and last value of everything logged in training."""
    names = sorted({name for row in rows for name in row if name.startswith("train/")})
    table = [["train", "first", "lowest", "last"]]
    for name in names:
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        if values:
            finite = [value for value in values if value == value] or values
            table.append([name, number(values[0]), number(min(finite)), number(values[-1])])
    return columns(table, [False, True, True, True]) if len(table) > 1 else []


def _monitor(about: Mapping[str, Any]) -> Monitor:
    """Return the run's own ``Checkpoint(best=)``; without one, the lowest loss."""
    text = str(about.get("options", {}).get("checkpoint", ""))
    for quote in "'\"":
        _, found, rest = text.partition(f"best={quote}")
        if found:
            return Monitor.parse(rest.partition(quote)[0], "Checkpoint(best=)")
    return Monitor("eval/loss", "min")


def _evaluations(
    rows: Sequence[Mapping[str, Any]], monitor: Monitor, everything: bool
) -> list[str]:
    measured = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if not measured:
        return ["no evaluations"]
    names = {name for row in measured for name in row if name.startswith("eval/")}
    shown_names = sorted(names - set(SPEED))
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


def _files(run_dir: Path) -> list[str]:
    found = [path for path in sorted(run_dir.iterdir()) if not path.name.startswith(".")]
    return [f"{path}{'/' if path.is_dir() else ''}" for path in found]


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]

"""``loopkit report RUN_DIR``: what a run did, read from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopkit.checkpoint import tools
from loopkit.cli.args.simple import Arguments
from loopkit.cli.ckpt import checkpoint_table
from loopkit.console.text import columns, cut, number
from loopkit.errors import LoopkitError
from loopkit.loggers.jsonl import read_rows
from loopkit.monitor import Monitor
from loopkit.options import Options

SPEED = ("eval/runtime", "eval/samples_per_second")
EVALUATIONS = 12
WIDTH = 120


def run(argv: Sequence[str]) -> int:
    """Print the report of a run; the exit code."""
    parser = Arguments(
        "loopkit report", "What a run did: its evaluations, the best one, checkpoints and files."
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(
        "--all", action="store_true", help=f"show more than {EVALUATIONS} evaluations"
    )
    given = parser.parse_args(argv)
    if not given.run_dir.is_dir():
        raise LoopkitError(f"there is no run directory {given.run_dir}")
    print(report(given.run_dir, everything=given.all))
    return 0


def report(run_dir: Path, *, everything: bool = False) -> str:
    """The report as text.

    Raises:
        LoopkitError: the directory holds nothing that a run writes.
    """
    about, rows, checkpoints = (
        _read_about(run_dir),
        _read_rows(run_dir),
        tools.list_checkpoints(run_dir),
    )
    if not about and not rows and not checkpoints:
        raise LoopkitError(
            f"{run_dir} holds no run: there is no metrics.jsonl, hparams.json or checkpoints in it"
        )
    best = _criterion(about)
    blocks = [_head(run_dir, about, rows), _training(rows), _evaluations(rows, best, everything)]
    blocks.append(
        ["checkpoints", *_indented(checkpoint_table(checkpoints))]
        if checkpoints
        else ["no checkpoints"]
    )
    blocks.append(["files", *_indented(_files(run_dir))])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _read_about(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / "hparams.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LoopkitError(f"{run_dir / 'hparams.json'} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _read_rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return read_rows(path) if path.exists() else []


def _head(run_dir: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    last = rows[-1] if rows else {}
    epoch = next((row["epoch"] for row in reversed(rows) if "epoch" in row), None)
    defaults = Options().to_dict()
    changed = {
        k: v for k, v in about.get("options", {}).items() if k not in defaults or defaults[k] != v
    }
    lines = [["run", str(run_dir)], ["task", str(about.get("task", "unknown"))]]
    lines += _pairs("arguments", about.get("hparams", {}))
    lines += _pairs("options", changed)
    if last:
        lines.append(
            [
                "last row",
                f"step {last['step']:,}" + (f", epoch {epoch:g}" if epoch is not None else ""),
            ]
        )
    return columns(lines, [False, False])


def _pairs(title: str, values: Mapping[str, Any]) -> list[list[str]]:
    """One line for each value, the title before the first."""
    shown = [cut(f"{name} = {value}", WIDTH) for name, value in values.items()]
    return [[title if at == 0 else "", text] for at, text in enumerate(shown)]


def _training(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """First, lowest and last value of everything logged while training."""
    names = sorted({name for row in rows for name in row if name.startswith("train/")})
    table = [["train", "first", "lowest", "last"]]
    for name in names:
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        if values:
            finite = [value for value in values if value == value] or values
            table.append([name, number(values[0]), number(min(finite)), number(values[-1])])
    return columns(table, [False, True, True, True]) if len(table) > 1 else []


def _criterion(about: Mapping[str, Any]) -> Monitor:
    """The metric that decides: the run's own, or the lowest loss."""
    text = str(about.get("options", {}).get("checkpoint", ""))
    for quote in "'\"":
        _, found, rest = text.partition(f"best={quote}")
        if found:
            return Monitor.parse(rest.partition(quote)[0], "Checkpoint(best=)")
    return Monitor("eval/loss", "min")


def _evaluations(rows: Sequence[Mapping[str, Any]], best: Monitor, everything: bool) -> list[str]:
    measured = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if not measured:
        return ["no evaluations"]
    names = sorted(
        {name for row in measured for name in row if name.startswith("eval/") and name not in SPEED}
    )
    top = next(iter(best.ranked(measured, lambda row: row)), None)
    shown = measured if everything or len(measured) <= EVALUATIONS else measured[-EVALUATIONS:]
    if top is not None and not any(row is top for row in shown):
        shown = [top, *shown[1:]]
    table = [["step", *names, ""]]
    for row in shown:
        cells = [
            number(row[name]) if isinstance(row.get(name), (int, float)) else "-" for name in names
        ]
        table.append([f"{row['step']:,}", *cells, f"best {best.name}" if row is top else ""])
    hidden = len(measured) - len(shown)
    title = f"evaluations: {len(measured)}" + (
        f", the last {len(shown)} (--all shows them all)" if hidden else ""
    )
    return [title, *_indented(columns(table, [True, *(True for _ in names), False]))]


def _files(run_dir: Path) -> list[str]:
    found = [path for path in sorted(run_dir.iterdir()) if not path.name.startswith(".")]
    return [f"{path}{'/' if path.is_dir() else ''}" for path in found]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]

"""``loopkit ckpt ls | verify | diff | export``: checkpoints as people look at them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from loopkit.checkpoint import Store, newest_valid, tools
from loopkit.checkpoint.discovery import Entry
from loopkit.checkpoint.format import checkpoints_dir
from loopkit.cli.args.simple import Arguments
from loopkit.console.text import columns, cut, number
from loopkit.errors import CheckpointError, NoGoodCheckpointError, OptionError, nearest

USAGE = """usage: loopkit ckpt COMMAND [...]

  ls RUN_DIR             the checkpoints of a run: step, size, metrics
  verify PATH            read every byte and compare it with what was written; exit code 65 if anything differs
  diff A B               what changed between two checkpoints; exit code 1 if anything did
  export CHECKPOINT DIR  the weights alone, as model.safetensors with the task's arguments in loopkit.json
"""
SHOWN = 20


def run(argv: Sequence[str]) -> int:
    """Run one of the checkpoint commands; the exit code."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "ls": ls,
        "verify": verify,
        "diff": diff,
        "export": export,
    }
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] not in commands:
        hint = " Did you mean 'ls'?" if argv[0] == "list" else nearest(argv[0], commands)
        raise OptionError(
            f"there is no command 'ckpt {argv[0]}'.{hint} Commands: {', '.join(commands)}"
        )
    return commands[argv[0]](argv[1:])


def ls(argv: Sequence[str]) -> int:
    """List the checkpoints of a run."""
    parser = Arguments("loopkit ckpt ls", "The checkpoints of a run, oldest first.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = parser.parse_args(argv)
    if not given.run_dir.is_dir():
        raise CheckpointError(f"there is no run directory {given.run_dir}")
    entries = tools.ls(given.run_dir)
    if given.json:
        for entry in entries:
            print(json.dumps(_facts(entry)))
    else:
        print(
            "\n".join(checkpoint_table(entries))
            if entries
            else f"no checkpoints in {given.run_dir}"
        )
    return 0


def checkpoint_table(entries: Sequence[Entry]) -> list[str]:
    """Checkpoints as aligned lines under a header."""
    names = sorted({name for entry in entries for name in entry.metrics if not _is_speed(name)})
    rows = [["checkpoint", "step", "kind", "size", *names, ""]]
    for entry in entries:
        size = _bytes(_size(entry)) if entry.manifest else "-"
        measured = [number(entry.metrics[name]) if name in entry.metrics else "-" for name in names]
        rows.append(
            [entry.path.name, f"{entry.step:,}", entry.kind, size, *measured, entry.problem or ""]
        )
    return columns(rows, [False, True, False, True, *(True for _ in names), False])


def _is_speed(name: str) -> bool:
    return name in ("eval/runtime", "eval/samples_per_second")


def _size(entry: Entry) -> int:
    return sum(record.size for record in entry.manifest.files.values()) if entry.manifest else 0


def _bytes(size: int) -> str:
    return (
        f"{size / 1e3:,.1f} kB"
        if size < 1e6
        else f"{size / 1e6:,.1f} MB"
        if size < 1e9
        else f"{size / 1e9:,.2f} GB"
    )


def _facts(entry: Entry) -> dict[str, object]:
    return {
        "path": str(entry.path),
        "step": entry.step,
        "kind": entry.kind,
        "bytes": _size(entry),
        "metrics": entry.metrics,
        "problem": entry.problem,
    }


def verify(argv: Sequence[str]) -> int:
    """Check every byte of a checkpoint, or of all of a run."""
    parser = Arguments(
        "loopkit ckpt verify",
        "Compare every byte with what was written. Exit code 65 if any differs.",
    )
    parser.add_argument("path", type=Path, help="a checkpoint or a run directory")
    given = parser.parse_args(argv)
    try:
        found = tools.verify_tree(given.path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error}: name a checkpoint or a run directory") from error
    for path, problems in found.items():
        print(f"{'BAD' if problems else 'ok '}  {path}")
        for problem in problems:
            print(f"     {problem}")
    return NoGoodCheckpointError.exit_code if any(found.values()) else 0


def diff(argv: Sequence[str]) -> int:
    """Show how two checkpoints differ."""
    parser = Arguments(
        "loopkit ckpt diff",
        "What changed from checkpoint A to checkpoint B. Exit code 1 if any did.",
    )
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument(
        "--all", action="store_true", help=f"show more than {SHOWN} changes of a kind"
    )
    given = parser.parse_args(argv)
    for path in (given.a, given.b):
        if not path.is_dir():
            raise CheckpointError(f"{path} is no checkpoint: there is no such directory")
        if checkpoints_dir(path).is_dir():
            raise CheckpointError(
                f"{path} is a run directory: name one of its checkpoints, see loopkit ckpt ls "
                f"{path}"
            )
    found = tools.diff(given.a, given.b)
    limit = None if given.all else SHOWN
    lines = _block("only in A", [[name] for name in found.removed], limit)
    lines += _block("only in B", [[name] for name in found.added], limit)
    lines += _block(
        "tensors that differ, with the largest difference",
        [
            [name, "other dtype or shape" if gap is None else number(gap)]
            for name, gap in found.changed.items()
        ],
        limit,
    )
    lines += _block(
        "state that differs",
        [
            [path, cut(repr(old), 40), cut(repr(new), 40)]
            for path, (old, new) in found.state.items()
        ],
        limit,
    )
    print("\n".join(lines) if lines else "no difference")
    return 1 if found else 0


def _block(title: str, rows: list[list[str]], limit: int | None) -> list[str]:
    if not rows:
        return []
    lines = [f"  {line}" for line in columns(rows[:limit], [False] * len(rows[0]))]
    more = len(rows) - len(lines)
    return [f"{title}: {len(rows)}", *lines, *([f"  and {more} more (--all)"] if more else [])]


def export(argv: Sequence[str]) -> int:
    """Write a checkpoint's weights for use elsewhere."""
    parser = Arguments(
        "loopkit ckpt export", "The weights alone: model.safetensors, and loopkit.json about them."
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint, or a run directory for its newest good one"
    )
    parser.add_argument("dir", type=Path, help="a directory that does not exist yet")
    given = parser.parse_args(argv)
    print(tools.export(_one(given.checkpoint), given.dir))
    return 0


def _one(path: Path) -> Path:
    if not checkpoints_dir(path).is_dir():
        if not path.is_dir():
            raise CheckpointError(f"{path} is no checkpoint: there is no such directory")
        return path
    found = newest_valid(Store(), path)
    if found is None:
        raise NoGoodCheckpointError(f"the run directory {path} holds no checkpoint")
    return found

"""``loopkit ckpt ls | verify | diff | export | import``: look at checkpoints, and bring in others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loopkit.checkpoint import Entry, resolve_checkpoint, tools
from loopkit.checkpoint.run_dirs import no_run_in
from loopkit.cli.args.command_parser import CommandParser
from loopkit.console.text import byte_size, columns, cut, number
from loopkit.errors import CheckpointError, NoValidCheckpointError, OptionError, nearest
from loopkit.storage import as_place, checkpoints_at, fetched, remote_problems

USAGE = """usage: loopkit ckpt COMMAND [...]

  ls RUN_DIR             list the checkpoints of a run: step, size, metrics
  verify PATH            compare every byte with what was written;
                         exit code 65 if any differs
  diff A B               show what changed between two checkpoints, or the
                         newest ones of two runs; exit code 1 if anything did
  export CHECKPOINT DIR  write the weights as model.safetensors, and the
                         task's arguments as loopkit.json
  import FILE RUN_DIR    write the weights of a file of torch.save, such as
                         Lightning's .ckpt, as a checkpoint

loopkit ckpt COMMAND --help shows the options of a command.
"""
MOST_CHANGES = 20
SPEED = ("eval/runtime", "eval/samples_per_second")


def run(argv: Sequence[str]) -> int:
    """Run one of the checkpoint commands; return the exit code."""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE, end="")
        return 0 if argv else 2
    commands = {"ls": ls, "verify": verify, "diff": diff, "export": export, "import": import_file}
    name = argv[0]
    if name not in commands:
        known = ", ".join(commands)
        hint = " Did you mean 'ls'?" if name == "list" else nearest(name, commands)
        raise OptionError(f"there is no command 'ckpt {name}'.{hint} Commands: {known}")
    return commands[name](argv[1:])


def ls(argv: Sequence[str]) -> int:
    """List the checkpoints of a run."""
    parser = CommandParser("ckpt ls", "List the checkpoints of a run, oldest first.")
    parser.add_argument("run_dir", type=as_place, help="the directory of the run, or its URL")
    parser.add_argument("--json", action="store_true", help="print a JSON object on each line")
    given = parser.parse_args(argv)
    if isinstance(given.run_dir, str):
        checkpoints, _ = checkpoints_at(given.run_dir)
        entries, parent = checkpoints.entries(), checkpoints.remote.url
    else:
        entries, parent = _local_entries(given.run_dir), ""
    if given.json:
        lines = [json.dumps(_facts(entry, parent)) for entry in entries]
    else:
        lines = checkpoint_table(entries) or [f"no checkpoints in {given.run_dir}"]
    print(*lines, sep="\n", end="\n" if lines else "")
    return 0


def _local_entries(run_dir: Path) -> list[Entry]:
    if not run_dir.is_dir():
        raise CheckpointError(f"there is no run directory {run_dir}")
    entries = tools.list_checkpoints(run_dir)
    if not entries and (problem := no_run_in(run_dir)):
        raise CheckpointError(problem)
    return entries


def checkpoint_table(entries: Sequence[Entry]) -> list[str]:
    """Return a header and a line for each checkpoint; nothing without checkpoints."""
    if not entries:
        return []
    names = sorted({name for entry in entries for name in entry.metrics if name not in SPEED})
    rows = [["checkpoint", "step", "kind", "size", *names, ""]]
    for entry in entries:
        size = byte_size(_size(entry)) if entry.manifest else "-"
        metrics = [number(entry.metrics[name]) if name in entry.metrics else "-" for name in names]
        head = [entry.path.name, f"{entry.step:,}", entry.kind, size]
        rows.append([*head, *metrics, entry.problem or ""])
    return columns(rows, [False, True, False, True, *(True for _ in names), False])


def _size(entry: Entry) -> int:
    return sum(record.size for record in entry.manifest.files.values()) if entry.manifest else 0


def _facts(entry: Entry, parent: str) -> dict[str, object]:
    return {
        "path": f"{parent}/{entry.path.name}" if parent else str(entry.path),
        "step": entry.step,
        "kind": entry.kind,
        "bytes": _size(entry),
        "metrics": entry.metrics,
        "problem": entry.problem,
    }


def verify(argv: Sequence[str]) -> int:
    """Check every byte of a checkpoint, or of all checkpoints of a run."""
    parser = CommandParser(
        "ckpt verify", "Compare every byte with what was written. Exit code 65 if any differs."
    )
    parser.add_argument("path", type=as_place, help="a checkpoint or a run directory, or its URL")
    given = parser.parse_args(argv)
    found: Mapping[Path, list[str]] | Mapping[str, list[str]]
    try:
        if isinstance(given.path, str):
            found = remote_problems(given.path)
        else:
            found = tools.verify_tree(given.path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error}: name a checkpoint or a run directory") from error
    for path, problems in found.items():
        print(f"{'BAD' if problems else 'ok '}  {path}")
        for problem in problems:
            print(f"     {problem}")
    return NoValidCheckpointError.exit_code if any(found.values()) else 0


def diff(argv: Sequence[str]) -> int:
    """Show how two checkpoints differ."""
    parser = CommandParser(
        "ckpt diff", "Show what changed from checkpoint A to B. Exit code 1 if anything did."
    )
    what = "a checkpoint, or a run directory for its newest valid checkpoint; a path or a URL"
    parser.add_argument("a", type=as_place, metavar="A", help=what)
    parser.add_argument("b", type=as_place, metavar="B", help=what)
    parser.add_argument(
        "--all", action="store_true", help=f"show more than {MOST_CHANGES} changes of a kind"
    )
    given = parser.parse_args(argv)
    with fetched(given.a) as a, fetched(given.b) as b:
        chosen = [resolve_checkpoint(path) for path in (a, b)]
        for name, path, typed in zip("AB", chosen, (given.a, given.b)):
            if path != typed:
                print(f"{name} is {path.name if isinstance(typed, str) else path}")
        found = tools.diff_checkpoints(chosen[0], chosen[1])
    gaps = {
        name: "other dtype or shape"
        if gap is None
        else f"{gap:,.0f}"
        if gap.is_integer()
        else number(gap)
        for name, gap in found.changed.items()
    }
    states = {path: (cut(repr(a), 40), cut(repr(b), 40)) for path, (a, b) in found.state.items()}
    tables = {
        "only in A": [[name] for name in found.removed],
        "only in B": [[name] for name in found.added],
        "tensors that differ, with the largest difference": [list(row) for row in gaps.items()],
        "state that differs": [[path, a, b] for path, (a, b) in states.items()],
    }
    limit = None if given.all else MOST_CHANGES
    for title, rows in tables.items():
        _print_table(title, rows, limit)
    if not found:
        print("no difference")
    return 1 if found else 0


def _print_table(title: str, rows: list[list[str]], limit: int | None) -> None:
    if not rows:
        return
    print(f"{title}: {len(rows)}")
    for line in columns(rows[:limit], [False] * len(rows[0])):
        print(f"  {line}")
    if limit is not None and len(rows) > limit:
        print(f"  and {len(rows) - limit} more (--all)")


def export(argv: Sequence[str]) -> int:
    """Write a checkpoint's weights for use elsewhere."""
    parser = CommandParser(
        "ckpt export", "Write the weights as model.safetensors, and loopkit.json about them."
    )
    parser.add_argument(
        "checkpoint",
        type=as_place,
        help="a checkpoint, or a run directory for its newest valid checkpoint; a path or a URL",
    )
    parser.add_argument("dir", type=as_place, help="a directory that does not exist yet")
    given = parser.parse_args(argv)
    _refuse_url(given.dir, "ckpt export writes")
    with fetched(given.checkpoint) as checkpoint:
        print(tools.export_model(resolve_checkpoint(checkpoint), given.dir))
    return 0


def _refuse_url(place: Path | str, does: str) -> None:
    if isinstance(place, str):
        raise OptionError(
            f"{does} to this machine, and {place} is a URL: name a local directory, and copy it to "
            "the store with the store's own program"
        )


def import_file(argv: Sequence[str]) -> int:
    """Write the weights of a file of ``torch.save`` as a checkpoint, in a process of its own."""
    parser = CommandParser(
        "ckpt import",
        "Write the weights of a file of torch.save, such as Lightning's .ckpt, as a checkpoint.",
    )
    parser.add_argument("file", type=Path, help="a state_dict, or a dict with one as state_dict")
    parser.add_argument("run_dir", type=as_place, help="the directory of the run to write it under")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="read all of the file, which runs code that it names: only if you trust its author",
    )
    given = parser.parse_args(argv)
    _refuse_url(given.run_dir, "ckpt import writes")
    if not given.file.is_file():
        raise CheckpointError(f"there is no file {given.file}")
    flags = ["--trust"] if given.trust else []
    command = [sys.executable, "-m", "loopkit.cli.torch_file", given.file, given.run_dir, *flags]
    return subprocess.run(command, check=False).returncode

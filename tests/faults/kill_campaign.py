"""Run as a program, single-threaded, because it forks for each kill; prints the counts as JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))

import torch
from snapshots import alike, make

from loopkit.checkpoint import (
    Store,
    apply_retention,
    clean,
    load_newest,
    newest_valid,
    read_checkpoint,
    scan,
    verify_checkpoint,
    write_checkpoint,
)
from loopkit.checkpoint.format import parse_name
from loopkit.monitor import Monitor
from loopkit.testing.forks import kill_at_every_operation


def settle(run_dir: Path) -> list[str]:
    """As the next start of the run does; the names that are left."""
    parent = run_dir / "checkpoints"
    clean(Store(), run_dir)
    names = sorted(os.listdir(parent)) if parent.exists() else []
    odd = [
        name
        for name in names
        if parse_name(name) is None and name != "latest" and ".corrupt-" not in name
    ]
    assert not odd, f"left behind: {odd}"
    return names


def only_whole(run_dir: Path) -> None:
    for entry in scan(Store(), run_dir):
        assert verify_checkpoint(Store(), entry.path) == [], entry.path
        assert alike(read_checkpoint(Store(), entry.path), make(entry.step)), entry.path


def save() -> int:
    def check(run_dir: Path) -> None:
        settle(run_dir)
        only_whole(run_dir)
        found = load_newest(Store(), run_dir)
        assert found is not None
        assert found[1].meta["step"] in (1, 2)
        assert alike(found[1], make(found[1].meta["step"]))
        # And the run continues from there.
        write_checkpoint(Store(), run_dir, make(3))
        assert alike(load_newest(Store(), run_dir)[1], make(3))

    return kill_at_every_operation(
        prepare=lambda run_dir: write_checkpoint(Store(), run_dir, make(1)),
        act=lambda store, run_dir: write_checkpoint(store, run_dir, make(2)),
        check=check,
    )


def first_save() -> int:
    def check(run_dir: Path) -> None:
        settle(run_dir)
        only_whole(run_dir)
        newest_valid(Store(), run_dir)

    return kill_at_every_operation(
        prepare=lambda run_dir: None,
        act=lambda store, run_dir: write_checkpoint(store, run_dir, make(1)),
        check=check,
    )


def retention() -> int:
    def prepare(run_dir: Path) -> None:
        for step in (6, 7, 8):
            write_checkpoint(Store(), run_dir, make(step))

    def act(store: Store, run_dir: Path) -> None:
        assert (
            apply_retention(
                store, run_dir, keep=1, keep_best=1, best=Monitor("eval/accuracy", "max")
            )
            != []
        )

    def check(run_dir: Path) -> None:
        names = settle(run_dir)
        only_whole(run_dir)
        assert {"step-000000000006", "step-000000000008"} <= set(names)
        assert newest_valid(Store(), run_dir).name == "step-000000000008"

    return kill_at_every_operation(prepare, act, check)


def quarantine() -> int:
    def prepare(run_dir: Path) -> None:
        write_checkpoint(Store(), run_dir, make(1))
        for step in (2, 3):
            with open(
                write_checkpoint(Store(), run_dir, make(step)) / "model.safetensors", "r+b"
            ) as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x7f")

    def act(store: Store, run_dir: Path) -> None:
        assert newest_valid(store, run_dir, warn=lambda text: None).name == "step-000000000001"

    def check(run_dir: Path) -> None:
        settle(run_dir)
        path, snapshot = load_newest(Store(), run_dir, warn=lambda text: None)
        assert path.name == "step-000000000001"
        assert alike(snapshot, make(1))
        assert sorted(os.listdir(run_dir / "checkpoints")) == [
            "latest",
            "step-000000000001",
            "step-000000000002.corrupt-1",
            "step-000000000003.corrupt-1",
        ]

    return kill_at_every_operation(prepare, act, check)


def cleaning() -> int:
    def prepare(run_dir: Path) -> None:
        write_checkpoint(Store(), run_dir, make(1))
        for name in (".staging-gone", ".deleting-step-000000000000-ab"):
            folder = run_dir / "checkpoints" / name / "shards"
            folder.mkdir(parents=True)
            (folder / "x").write_bytes(b"x")

    def check(run_dir: Path) -> None:
        assert settle(run_dir) == ["latest", "step-000000000001"]
        only_whole(run_dir)

    return kill_at_every_operation(prepare, clean, check)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    print(
        json.dumps(
            {part.__name__: part() for part in (save, first_save, retention, quarantine, cleaning)}
        )
    )

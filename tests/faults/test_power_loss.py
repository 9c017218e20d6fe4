"""Power loss at any moment: what was not synced may be there, gone, torn or zeros, in any
combination.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))

from snapshots import alike, make
from store_faults import MEMORY

from loopkit.checkpoint import Store, apply_retention, clean, load_newest, scan, write_checkpoint
from loopkit.errors import CheckpointError

Operation = tuple[str, Path, Any]


class Logging(Store):
    def __init__(self) -> None:
        self.log: list[Operation] = []

    def _op(self, kind: str, path: Path, extra: Any = None) -> None:
        self.log.append((kind, path, bytes(extra) if kind == "write" else extra))


@dataclass
class File:
    data: bytes = b""
    synced: bytes = b""

    def after(self, made: random.Random) -> bytes:
        """What may be on the disk: the synced bytes surely, the others in some state."""
        if self.data == self.synced:
            return self.data
        half = len(self.data) // 2
        return made.choice(
            [
                self.synced,
                b"",
                self.data,
                self.data[:half],
                bytes(len(self.data)),
                self.data[:half] + bytes(half),
            ]
        )


@dataclass
class Folder:
    names: dict[str, Any] = field(default_factory=dict)
    synced: dict[str, Any] = field(default_factory=dict)
    # What happened to names since the last sync: (name before, name after, what it names).
    changes: list[tuple[str | None, str | None, Any]] = field(default_factory=list)

    def change(self, before: str | None, after: str | None, node: Any = None) -> None:
        self.changes.append((before, after, node))
        _apply(self.names, self.changes[-1:])

    def sync(self) -> None:
        self.synced, self.changes = dict(self.names), []

    def after(self, made: random.Random) -> dict[str, Any]:
        """All changes, none, the first few, or some of them: file systems may reorder until told to
        sync.
        """
        some = [change for change in self.changes if made.random() < 0.5]
        first = self.changes[: made.randrange(len(self.changes) + 1)]
        return _apply(dict(self.synced), made.choice([self.changes, [], first, some]))


def _apply(
    names: dict[str, Any], changes: list[tuple[str | None, str | None, Any]]
) -> dict[str, Any]:
    for before, after, node in changes:
        if before is None or before in names:
            found = node if before is None else names.pop(before)
            names.update({after: found} if after is not None else {})
    return names


class Disk:
    """What a file system may keep, for operations that have been asked for."""

    def __init__(self, root: Path, ignore: tuple[str, ...] = ()):
        self.root, self.ignore, self.top = root, ignore, Folder()

    def at(self, path: Path) -> Any:
        node: Any = self.top
        for part in path.relative_to(self.root).parts:
            node = node.names[part]
        return node

    def do(self, operation: Operation) -> None:
        kind, path, extra = operation
        if kind in self.ignore or kind in ("names", "stat", "open", "read"):
            return
        if kind == "write":
            self.at(path).data += extra
        elif kind == "sync":
            self.at(path).synced = self.at(path).data
        elif kind == "sync_dir":
            self.at(path).sync()
        elif kind == "rename":
            assert extra.parent == path.parent
            self.at(path.parent).change(path.name, extra.name)
        elif kind in ("remove", "rmdir"):
            self.at(path.parent).change(path.name, None)
        elif path.name not in self.at(path.parent).names:
            self.at(path.parent).change(None, path.name, {"mkdir": Folder, "create": File}[kind]())

    def crash(self, made: random.Random, target: Path) -> None:
        self._put(self.top, made, target)

    def _put(self, folder: Folder, made: random.Random, target: Path) -> None:
        for name, node in folder.after(made).items():
            if isinstance(node, File):
                (target / name).write_bytes(node.after(made))
            else:
                (target / name).mkdir()
                self._put(node, made, target / name)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The log of three saves with retention, and after which operation which step is promised."""
    run_dir, store, promised = tmp_path_factory.mktemp("story"), Logging(), {0: 0}
    for step in (1, 2, 3):
        write_checkpoint(store, run_dir, make(step))
        promised[len(store.log)] = step
        apply_retention(store, run_dir, keep=1)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step-000000000003",
    ]
    return run_dir, store.log, promised


def states(story, samples: int, seed: int, ignore: tuple[str, ...] = ()) -> int:
    """Check every prefix of the log in ``samples`` states of the disk; how many states that were."""
    run_dir, log, promised = story
    disk, made, count, promise = Disk(run_dir, ignore), random.Random(seed), 0, 0
    for number in range(len(log) + 1):
        promise = promised.get(number, promise)
        for _ in range(samples):
            with tempfile.TemporaryDirectory(dir=MEMORY) as name:
                after, told = Path(name), []
                disk.crash(made, after)
                clean(Store(), after)
                found = load_newest(Store(), after, warn=told.append)
                step = found[1].meta["step"] if found else 0
                assert step >= promise, (
                    f"operation {number}: step {promise} was promised, {step} is there"
                )
                assert found is None or alike(found[1], make(step)), (
                    f"operation {number}: another content"
                )
                assert told == [], f"operation {number}: {told}"
                bad = [entry.problem for entry in scan(Store(), after, deep=True) if entry.problem]
                assert bad == [], f"operation {number}: {bad}"
                count += 1
        if number < len(log):
            disk.do(log[number])
    return count


def test_every_moment_leaves_some_complete_checkpoint(story):
    assert states(story, samples=10, seed=0) >= 2000


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_thousand_states_in_ten_parts(story, seed):
    assert states(story, samples=10, seed=seed) >= 2000


@pytest.mark.parametrize("ignored", ["sync", "sync_dir"])
def test_the_model_of_the_disk_does_find_what_is_not_synced(story, ignored):
    with pytest.raises((AssertionError, CheckpointError)):
        states(story, samples=10, seed=0, ignore=(ignored,))


def test_each_sync_in_the_log_is_one_that_the_system_was_asked_for(tmp_path, monkeypatch):
    asked, fsync, store = [], os.fsync, Logging()
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (asked.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)),
    )
    write_checkpoint(store, tmp_path, make(1))
    assert asked == [str(path) for kind, path, _ in store.log if kind in ("sync", "sync_dir")]
    assert len(asked) > 10

"""Disk: what a file system may hold after a power loss, given the operations before it."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Operation = tuple[str, Path, Any]
"""One file operation: its kind, its path, and the bytes of a write or the target of a rename."""


@dataclass
class File:
    """The content that programs see, and the content that was synced last."""

    data: bytes = b""
    synced: bytes = b""

    def after(self, chosen: random.Random) -> bytes:
        """Return what may be on the disk: synced bytes surely, later ones in some state."""
        if self.data == self.synced:
            return self.data
        half = len(self.data) // 2
        # An append loses its own bytes alone. A file that was rewritten can lose all of them.
        kept = len(self.synced) if self.data.startswith(self.synced) else 0
        return chosen.choice(
            [
                self.synced,
                self.data[:kept],
                self.data,
                self.data[: max(kept, half)],
                self.data[:kept] + bytes(len(self.data) - kept),
                self.data[: max(kept, half)] + bytes(min(half, len(self.data) - kept)),
            ]
        )


@dataclass
class Folder:
    """The entries that programs see, those that were synced last, and the changes since."""

    names: dict[str, Any] = field(default_factory=dict)
    synced: dict[str, Any] = field(default_factory=dict)
    # Each change: (name before, name after, what it names).
    changes: list[tuple[str | None, str | None, Any]] = field(default_factory=list)

    def change(self, before: str | None, after: str | None, node: Any = None) -> None:
        """Add, rename or remove an entry."""
        self.changes.append((before, after, node))
        _apply(self.names, self.changes[-1:])

    def sync(self) -> None:
        """Make the entries durable."""
        self.synced, self.changes = dict(self.names), []

    def after(self, chosen: random.Random) -> dict[str, Any]:
        """Return what may be on the disk: all changes, none, the first few, or some of them.

        A file system with a journal keeps their order. POSIX promises no order before a sync.
        """
        some = [change for change in self.changes if chosen.random() < 0.5]
        first = self.changes[: chosen.randrange(len(self.changes) + 1)]
        return _apply(dict(self.synced), chosen.choice([self.changes, [], first, some]))


def _apply(
    names: dict[str, Any], changes: Iterable[tuple[str | None, str | None, Any]]
) -> dict[str, Any]:
    for before, after, node in changes:
        if before is None or before in names:
            found = node if before is None else names.pop(before)
            if after is not None:
                names[after] = found
    return names


class Disk:
    """A file system below ``root``, which is empty and durable before the first operation.

    Args:
        root: the directory that the operations' paths lie below.
        ignore: kinds of operations that this disk forgets, to test that a check notices.
    """

    def __init__(self, root: Path, ignore: Collection[str] = ()) -> None:
        self.root, self.ignore, self.top = root, ignore, Folder()
        self._kinds: dict[str, Callable[[Path, Any], None]] = {
            "write": self._write,
            "truncate": self._truncate,
            "sync": self._sync,
            "sync_dir": self._sync_dir,
            "rename": self._rename,
            "remove": self._remove,
            "rmdir": self._remove,
            "mkdir": lambda path, extra: self._make(path, Folder()),
            "create": lambda path, extra: self._make(path, File()),
        }

    def do(self, operation: Operation) -> None:
        """Apply one operation; kinds that change nothing have no effect."""
        kind, path, extra = operation
        if kind in self._kinds and kind not in self.ignore:
            self._kinds[kind](path, extra)

    def crash(self, chosen: random.Random, target: Path) -> None:
        """Write into the empty directory ``target`` what the disk may hold after a power loss."""
        self._put(self.top, chosen, target)

    def _put(self, folder: Folder, chosen: random.Random, target: Path) -> None:
        for name, node in folder.after(chosen).items():
            if isinstance(node, File):
                (target / name).write_bytes(node.after(chosen))
            else:
                (target / name).mkdir()
                self._put(node, chosen, target / name)

    def _at(self, path: Path) -> Any:
        node: Any = self.top
        for part in path.relative_to(self.root).parts:
            node = node.names[part]
        return node

    def _write(self, path: Path, data: bytes) -> None:
        self._at(path).data += data

    def _truncate(self, path: Path, size: int) -> None:
        file = self._at(path)
        file.data = file.data[:size]

    def _sync(self, path: Path, extra: Any) -> None:
        file = self._at(path)
        file.synced = file.data

    def _sync_dir(self, path: Path, extra: Any) -> None:
        if path.is_relative_to(self.root):  # everything above is durable already
            self._at(path).sync()

    def _rename(self, path: Path, target: Path) -> None:
        if target.parent != path.parent:
            raise ValueError(f"{path} is renamed into another directory, {target.parent}")
        self._at(path.parent).change(path.name, target.name)

    def _remove(self, path: Path, extra: Any) -> None:
        folder = self._at(path.parent)
        if path.name in folder.names:
            folder.change(path.name, None)

    def _make(self, path: Path, node: File | Folder) -> None:
        folder = self._at(path.parent)
        if path.name not in folder.names:
            folder.change(None, path.name, node)

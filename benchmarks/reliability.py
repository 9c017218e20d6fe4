"""What a run becomes after a stop, a kill, damage and worse: loopkit and its peers in small real jobs.

    python benchmarks/reliability.py

Each run is a process of its own. The oracle is the run that nothing disturbed, in the same framework.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from benchmarks.resumable import FRAMEWORKS, newest_checkpoint

SCRIPT = Path(__file__).with_name("resumable.py")
STEPS, STOP = 20, 10
KILLS = (0.0, 0.002, 0.005, 0.01, 0.02)
PACKAGES = ("torch", "loopkit-torch", "transformers", "lightning", "accelerate")


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, where it began, its weights, and its last line of error."""

    code: int
    began: int = -1
    digest: str = ""
    error: str = ""


def run(name: str, folder: Path, steps: int, *more: str, **variables: str) -> Ended:
    """Train in a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, str(folder), str(steps), *more],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"began"')]
    if done.returncode or not lines:
        error = [line for line in done.stderr.splitlines() if line.strip()]
        return Ended(done.returncode or 1, error=error[-1][:200] if error else "")
    return Ended(0, **json.loads(lines[-1]))


def judged(ended: Ended, whole: Ended) -> str:
    """Return what became of the run, in a few words."""
    if ended.code:
        return "error"
    if ended.digest == whole.digest:
        return "same bits" if ended.began in (STOP, 15) else f"same bits, from step {ended.began}"
    return "starts from 0" if ended.began == 0 else f"another run, from step {ended.began}"


class Scenes:
    """The scenes for one framework.

    Args:
        name: the framework.
        place: a folder for its runs.
    """

    def __init__(self, name: str, place: Path) -> None:
        self.name, self.place = name, place
        self.whole = run(name, place / "whole", STEPS)
        if self.whole.code:
            raise RuntimeError(f"{name} does not train: {self.whole.error}")
        run(name, place / "stopped", STOP)

    def resumed(self, change: Callable[[Path], object]) -> Ended:
        """Resume a copy of the stopped run, after ``change`` to its folder."""
        folder = self.place / f"copy-{time.monotonic_ns()}"
        shutil.copytree(self.place / "stopped", folder)
        change(folder)
        return run(self.name, folder, STEPS, "resume")

    def verdict(self, change: Callable[[Path], object]) -> str:
        """Return what became of the stopped run."""
        return judged(self.resumed(change), self.whole)

    def stop(self) -> str:
        """Stop in the middle of an epoch, and resume in a new process."""
        return self.verdict(lambda folder: None)

    def flipped_bit(self) -> str:
        """Flip a bit in the middle of the largest file of the newest checkpoint."""
        return self.verdict(lambda folder: _flip(_largest(folder)))

    def missing_file(self) -> str:
        """Delete the largest file of the newest checkpoint."""
        return self.verdict(lambda folder: _largest(folder).unlink())

    def cut_file(self) -> str:
        """Cut the largest file of the newest checkpoint to its half."""
        return self.verdict(
            lambda folder: os.truncate(p := _largest(folder), p.stat().st_size // 2)
        )

    def clock(self) -> str:
        """Give the older checkpoint the later file time, as a clock that was set back does."""

        def change(folder: Path) -> None:
            newest = newest_checkpoint(folder)
            assert newest is not None
            for path in folder.rglob("*"):
                inside = path == newest or newest in path.parents
                os.utime(path, (1e9, 1e9) if inside else None)

        return self.verdict(change)

    def killed(self) -> str:
        """Kill the process within a save, at several moments, and resume."""
        verdicts = []
        for number, after in enumerate(KILLS):
            folder = self.place / f"killed-{number}"
            run(self.name, folder, STEPS, KILL_AFTER=str(after))
            verdicts.append(judged(run(self.name, folder, STEPS, "resume"), self.whole))
        return _counted(verdicts)

    def full_disk(self) -> str:
        """Let the disk be full in the second save, free it, and resume."""
        size = sum(p.stat().st_size for p in (self.place / "stopped").rglob("*") if p.is_file())
        folder = self.place / "small-disk"
        folder.mkdir()
        megabytes = int(0.75 * size / 1e6) + 1
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return "not run: no right to mount"
        try:
            run(self.name, folder / "run", STEPS)
            subprocess.run(["mount", "-o", "remount,size=512m", str(folder)], check=True)
            return judged(run(self.name, folder / "run", STEPS, "resume"), self.whole)
        finally:
            subprocess.run(["umount", str(folder)], check=False)

    def hostile(self) -> str:
        """Put a pickle that runs a command into each file of the newest checkpoint in turn."""
        newest = newest_checkpoint(self.place / "stopped")
        assert newest is not None
        inner = [p for p in newest.rglob("*") if p.is_file()] if newest.is_dir() else [newest]
        marker = self.place / "executed"
        for path in inner:

            def change(folder: Path, path: Path = path) -> None:
                target = folder / path.relative_to(self.place / "stopped")
                target.write_bytes(pickle.dumps(_Runs(marker)))

            self.resumed(change)
            if marker.exists():
                return f"runs it ({path.name})"
        return "runs nothing"


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


SCENES = {
    "stop in mid-epoch": Scenes.stop,
    "kill -9 within a save": Scenes.killed,
    "flipped bit": Scenes.flipped_bit,
    "missing file": Scenes.missing_file,
    "file cut to half": Scenes.cut_file,
    "full disk": Scenes.full_disk,
    "clock set back": Scenes.clock,
    "hostile file": Scenes.hostile,
}


def _largest(folder: Path) -> Path:
    newest = newest_checkpoint(folder)
    assert newest is not None
    if not newest.is_dir():
        return newest
    return max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def _counted(verdicts: list[str]) -> str:
    return ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))


def main() -> None:
    """Run all scenes, print a table, and write the results."""
    parser = argparse.ArgumentParser(description="What a run becomes after a stop and worse.")
    parser.add_argument("--only", nargs="+", choices=FRAMEWORKS, help="these alone; writes nothing")
    args = parser.parse_args()
    table: dict[str, dict[str, str]] = {scene: {} for scene in SCENES}
    for name in args.only or FRAMEWORKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                scenes = Scenes(name, Path(folder))
            except RuntimeError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            for scene, act in SCENES.items():
                table[scene][name] = act(scenes)
                print(f"{name:12} {scene:24} {table[scene][name]}", flush=True)
    if not args.only:
        about = {"steps": STEPS, "kills": len(KILLS), "versions": record.versions(PACKAGES)}
        record.save("reliability", {**about, "table": table})


if __name__ == "__main__":
    main()

"""JsonlLogger: one strict JSON object a row, which stands once however often the run is killed and
resumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from loopkit.files import rename_aside, write_file
from loopkit.keywords import checks_keywords
from loopkit.loggers.base import Logger
from loopkit.loggers.serialize import plain

_ODD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@checks_keywords
class JsonlLogger(Logger):
    """Writes ``{"step": …, "train/loss": …}`` a line to metrics.jsonl, each on disk when ``log``
    returns.

    NaN and infinities are the strings "nan", "inf" and "-inf", which ``read_rows`` turns back into
    numbers. Arrays of up to 10,000 elements go to a file beside it (metrics.arrays.jsonl) as nested
    lists, so that rows stay flat; of larger ones only the shape. Hyperparameters go to hparams.json
    in the run directory.

    Args:
        path: the file, absolute or within the run directory; None is metrics.jsonl.

    Attributes:
        rows: after ``open``, the rows of earlier attempts that still hold.
    """

    name = "jsonl"

    def __init__(self, path: str | Path | None = None) -> None:
        self._given = Path(path or "metrics.jsonl")
        self.rows: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._arrays: IO[bytes] | None = None

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """Go on after ``step``: later rows and a torn last line are dropped. At step 0 the file
        starts anew.
        """
        self.close()
        self.path = Path(run_dir) / self._given
        self._arrays_path = self.path.with_suffix(".arrays.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = _resume(self.path, step)
        _resume(self._arrays_path, step)
        text = json.dumps(plain(hparams), indent=2, ensure_ascii=False)
        write_file(Path(run_dir) / "hparams.json", [_bytes(text + "\n")], durable=True)
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append one row; a value that is itself called "step" gives way to the row's step."""
        assert self._file is not None
        _append(self._file, values, step)

    def log_arrays(self, arrays: Mapping[str, Any], step: int) -> None:
        """Append one row of nested lists to the arrays' own file."""
        if self._arrays is None:
            self._arrays = open(self._arrays_path, "ab")  # noqa: SIM115 - closed by close()
        _append(self._arrays, arrays, step)

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._arrays):
            if file is not None:
                file.close()
        self._file = self._arrays = None


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order, numbers as numbers; lines torn by a crash are left out."""
    with open(path, "rb") as file:
        return [row for line in file if (row := _parsed(line)) is not None]


def _append(file: IO[bytes], values: Mapping[str, Any], step: int) -> None:
    row = {"step": step, **values, "step": step}  # noqa: F601 - first in order, and last in rank
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        text = json.dumps(plain(row), ensure_ascii=False, allow_nan=False)
    file.write(_bytes(text + "\n"))
    file.flush()


def _bytes(text: str) -> bytes:
    # A lone surrogate has no UTF-8; its backslash form is what JSON escapes it to.
    return text.encode("utf-8", "backslashreplace")


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {name: _number(value) for name, value in row.items()}


def _number(value: Any) -> Any:
    if isinstance(value, str):
        return _ODD.get(value, value)
    return [_number(part) for part in value] if isinstance(value, list) else value


def _resume(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut the file back to ``step``; returns the rows that stay."""
    if step == 0:
        rename_aside(path)
    if not path.exists():
        return []
    rows, lines, cut = [], [], False
    with open(path, "rb") as file:
        for line in file:
            row = _parsed(line)
            if row is None or row["step"] > step:
                cut = True
            else:
                rows.append(row)
                lines.append(line)
    if cut:
        write_file(path, lines, durable=True)
    return rows

"""JsonlLogger: one strict JSON object per row, and each row once, even if the run is killed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from loopkit.errors import LoopkitWarning
from loopkit.files import rename_aside, write_file
from loopkit.keywords import checks_keywords
from loopkit.loggers.base import Logger
from loopkit.loggers.serialize import jsonable

_NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@checks_keywords
class JsonlLogger(Logger):
    """Write a line such as ``{"step": 50, "time": 1764351547.2, "train/loss": 0.3}`` for every log.

    The file is metrics.jsonl, and ``time`` counts seconds since 1970, of the computer's clock. A
    line is in the file when ``log`` returns. NaN and infinities are the strings "nan", "inf" and
    "-inf", which ``read_rows`` converts back into numbers. Arrays of up to 10,000 elements are
    nested lists in a second file, metrics.arrays.jsonl, so that rows stay flat; of larger arrays
    only the shape is written. Hyperparameters are in hparams.json in the run directory.

    Args:
        path: of the file, absolute or within the run directory; None for metrics.jsonl.

    Attributes:
        rows: after ``open``, the rows of earlier attempts that are still valid, without their times.
    """

    name = "jsonl"

    def __init__(self, path: str | Path | None = None) -> None:
        self._given = Path(path or "metrics.jsonl")
        self.rows: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._arrays: IO[bytes] | None = None
        self._warned = False

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """Keep the rows up to ``step``, and drop a torn last line. At step 0 start a new file."""
        self.close()
        self.path = Path(run_dir) / self._given
        self._arrays_path = self.path.with_suffix(".arrays.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = _resume(self.path, step)
        self.rows = [{n: value for n, value in row.items() if n != "time"} for row in rows]
        _resume(self._arrays_path, step)
        text = json.dumps(jsonable(hparams), indent=2, ensure_ascii=False)
        write_file(Path(run_dir) / "hparams.json", [_bytes(text + "\n")], durable=True)
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append one row. Its step and time replace values that are called "step" and "time".

        Warns once of a value called "time".
        """
        assert self._file is not None
        if "time" in values and not self._warned:
            self._warned = True
            warnings.warn(
                f"a value called 'time' is not kept in {self._given}, where 'time' is when a row "
                "was logged: give it another name",
                LoopkitWarning,
                stacklevel=2,
            )
        _append(self._file, values, step)

    def log_arrays(self, arrays: Mapping[str, Any], step: int) -> None:
        """Append one row of nested lists to the arrays' own file."""
        if self._arrays is None:
            self._arrays = open(self._arrays_path, "ab")  # noqa: SIM115 - closed by close()
        _append(self._arrays, arrays, step)

    def files(self) -> list[Path]:
        """Return the file of rows, and that of arrays if there is one."""
        return [self.path] if self._arrays is None else [self.path, self._arrays_path]

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._arrays):
            if file is not None:
                file.close()
        self._file = self._arrays = None


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl in order, without lines that a crash tore."""
    with open(path, "rb") as file:
        return [row for line in file if (row := _parsed(line)) is not None]


def _append(file: IO[bytes], values: Mapping[str, Any], step: int) -> None:
    # Step and time come first, and replace values of those names.
    first = {"step": step, "time": round(time.time(), 3)}
    row = {**first, **values, **first}
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        text = json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False)
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
        return _NOT_FINITE.get(value, value)
    return [_number(part) for part in value] if isinstance(value, list) else value


def _resume(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the rows after ``step`` from a file, and return the others."""
    if step == 0:
        rename_aside(path)
    if not path.exists():
        return []
    rows, lines = [], []
    cut = False
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

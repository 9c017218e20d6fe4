"""CsvLogger: a table with a column for every name that was ever logged."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import IO, Any

from loopkit.files import rename_aside, write_file
from loopkit.keywords import checks_keywords
from loopkit.loggers.base import Logger

# The pause after the file was rewritten, as a multiple of the time that it took.
_PAUSE = 20


@checks_keywords
class CsvLogger(Logger):
    """Write a row of metrics.csv for every log; cells without a value are empty.

    A new name adds a column, and the file is rewritten in one piece. Rewriting takes at most a
    twentieth of the time: until the next one, rows with new names are kept in memory. ``flush`` and
    ``close`` write them at once.

    Args:
        path: of the file, absolute or within the run directory; None for metrics.csv.
        clock: returns seconds; for tests.
    """

    name = "csv"

    def __init__(
        self, path: str | Path | None = None, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._given = Path(path or "metrics.csv")
        self._clock = clock
        self._file: IO[bytes] | None = None
        self._columns: dict[str, None] = {"step": None}
        self._waiting: list[dict[str, Any]] = []
        self._not_before = 0.0

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """Keep the rows up to ``step``, and drop a torn last line. At step 0 start a new file."""
        self.close()
        self.path = Path(run_dir) / self._given
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if step == 0:
            rename_aside(self.path)
        self._columns, rows = _read(self.path)
        kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step]
        write_file(self.path, [_line(self._columns), *map(_line, kept)], durable=True)
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append one row. The row's step replaces a value that is called "step"."""
        assert self._file is not None
        row = {**values, "step": step}
        if self._waiting or not row.keys() <= self._columns.keys():
            self._waiting.append(row)
            if self._clock() >= self._not_before:
                self._rewrite()
            return
        self._file.write(_line(row.get(name, "") for name in self._columns))
        self._file.flush()

    def flush(self) -> None:
        """Write the rows that wait for new columns."""
        if self._waiting:
            self._rewrite()

    def files(self) -> list[Path]:
        """Return the table."""
        return [self.path]

    def close(self) -> None:
        """Write the rows that wait, and close the file."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def _rewrite(self) -> None:
        """Write the file again with the new columns."""
        began = self._clock()
        for row in self._waiting:
            self._columns |= dict.fromkeys(row)
        _, rows = _read(self.path)
        write_file(self.path, self._all_lines(rows), durable=True)
        self._waiting = []
        assert self._file is not None
        self._file.close()
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()
        ended = self._clock()
        self._not_before = ended + _PAUSE * (ended - began)

    def _all_lines(self, rows: Iterable[list[str]]) -> Iterator[bytes]:
        yield _line(self._columns)
        for row in rows:
            yield _line(row + [""] * (len(self._columns) - len(row)))
        for late in self._waiting:
            yield _line(late.get(name, "") for name in self._columns)


def _read(path: Path) -> tuple[dict[str, None], list[list[str]]]:
    """Return the columns and the rows of the complete lines of a file, if it exists."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1].decode("utf-8", "replace")
    lines = list(csv.reader(io.StringIO(whole, newline="")))
    if not lines or not lines[0]:
        return {"step": None}, []
    return dict.fromkeys(lines[0]), lines[1:]


def _line(cells: Iterable[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "backslashreplace")

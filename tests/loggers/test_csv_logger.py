from __future__ import annotations

import csv
import math
from pathlib import Path

from loopkit.loggers.csv import CsvLogger


def opened(run_dir: Path, step: int = 0, **options: object) -> CsvLogger:
    logger = CsvLogger(**options)
    logger.open(run_dir, step, {})
    return logger


def table(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_columns_grow_and_cells_without_a_value_are_empty(tmp_path):
    logger = opened(tmp_path)
    logger.log({"loss": 0.5}, 1)
    logger.log({"eval/loss": 0.25, "eval/accuracy": math.nan}, 2)
    logger.log({"loss": 0.125}, 3)
    logger.flush()
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,loss,eval/loss,eval/accuracy\n1,0.5,,\n2,,0.25,nan\n3,0.125,,\n"
    )


def test_a_row_of_known_columns_is_on_disk_when_log_returns(tmp_path):
    logger = opened(tmp_path)
    logger.log({"loss": 0.5}, 1)
    logger.log({"loss": 0.25}, 2)
    assert [row["loss"] for row in table(tmp_path)] == ["0.5", "0.25"]


def test_a_resume_drops_later_rows_and_a_torn_line(tmp_path):
    first = opened(tmp_path)
    for step in range(1, 6):
        first.log({"x": float(step)}, step)
    first.close()
    with open(tmp_path / "metrics.csv", "ab") as file:
        file.write(b"6,0.")
    second = opened(tmp_path, step=3)
    second.log({"x": 4.5, "y": 1.0}, 4)
    second.close()
    assert [(row["step"], row["x"], row["y"]) for row in table(tmp_path)] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "3.0", ""),
        ("4", "4.5", "1.0"),
    ]


def test_names_with_commas_quotes_newlines_and_emoji_stay_one_column_each(tmp_path):
    names = ["a,b", 'say "x"', "two\nlines", "🦊", "..", "\ud800"]
    logger = opened(tmp_path)
    logger.log(dict.fromkeys(names, 1.0), 1)
    logger.close()
    again = opened(tmp_path, step=1)
    again.log({"a,b": 2.0}, 2)
    again.close()
    assert list(table(tmp_path)[0]) == ["step", *names[:-1], "\\ud800"]
    assert [row["a,b"] for row in table(tmp_path)] == ["1.0", "2.0"]


def test_names_that_keep_coming_are_gathered_rather_than_written_anew_each_time(tmp_path):
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    logger = opened(tmp_path, clock=clock)
    widened = []
    to_float64 = logger._rewrite
    logger._rewrite = lambda: (widened.append(1), to_float64())
    for step in range(1, 101):
        logger.log({f"name {step}": 1.0}, step)
    assert 1 < len(widened) < 10
    logger.close()
    rows = table(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(1, 101))
    assert all(rows[step - 1][f"name {step}"] == "1.0" for step in range(1, 101))


def test_rows_stay_in_order_while_some_wait_for_a_column(tmp_path):
    logger = opened(tmp_path, clock=lambda: 0.0)
    logger._not_before = 1.0
    logger.log({"x": 1.0}, 1)
    logger.log({}, 2)
    logger.close()
    assert [row["step"] for row in table(tmp_path)] == ["1", "2"]

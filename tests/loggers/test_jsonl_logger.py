from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from loopkit.errors import LoopkitWarning
from loopkit.loggers import jsonl
from loopkit.loggers.base import Loggers
from loopkit.loggers.jsonl import JsonlLogger


def opened(run_dir: Path, step: int = 0, **hparams: object) -> JsonlLogger:
    logger = JsonlLogger()
    logger.open(run_dir, step, hparams)
    return logger


def read_rows(path: Path) -> list[dict[str, object]]:
    """The rows without their times, which each has that the logger wrote."""
    rows = jsonl.read_rows(path)
    assert abs(rows[-1]["time"] - time.time()) < 600
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_a_value_called_time_is_refused_aloud_once(tmp_path):
    logger = opened(tmp_path)
    with pytest.warns(LoopkitWarning, match="'time' is not kept in metrics.jsonl"):
        logger.log({"time": 3.0, "x": 1.0}, 1)
    logger.log({"time": 4.0, "x": 2.0}, 2)  # a second warning would be an error here
    assert read_rows(tmp_path / "metrics.jsonl")[0] == {"step": 1, "x": 1.0}


def strict(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_row_is_on_disk_when_log_returns(tmp_path):
    logger = opened(tmp_path)
    logger.log({"train/loss": 0.5, "lr": 1e-3}, 10)
    assert re.fullmatch(
        r'\{"step": 10, "time": \d{10}\.\d{1,3}, "train/loss": 0.5, "lr": 0.001\}\n',
        (tmp_path / "metrics.jsonl").read_text(),
    )


def test_numbers_that_json_has_not_are_written_strictly_and_read_back(tmp_path):
    logger = opened(tmp_path)
    logger.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2**70, "e": 1e-300}, 1)
    logger.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kept = strict(line)
    assert kept.pop("time")
    assert kept == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": 2**70, "e": 1e-300}
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"])
    assert (row["b"], row["c"], row["d"]) == (math.inf, -math.inf, 2**70)


@pytest.mark.parametrize("name", ["🦊/loss", "..", "../../etc", "a\nb", '"', "\ud800", "", "step"])
def test_any_name_is_kept(tmp_path, name):
    logger = opened(tmp_path)
    logger.log({name: 3.0}, 7)
    logger.log({"x": 1.0}, 8)
    logger.close()
    expected = {"step": 7} if name == "step" else {"step": 7, name: 3.0}
    assert read_rows(tmp_path / "metrics.jsonl") == [expected, {"step": 8, "x": 1.0}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hparams.json", "metrics.jsonl"]


def test_a_hundred_thousand_names_fit_in_a_row(tmp_path):
    logger = opened(tmp_path)
    logger.log({f"name/{number}": float(number) for number in range(100_000)}, 1)
    logger.close()
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert len(row) == 100_001


def test_a_resume_drops_later_rows_and_a_torn_line_so_that_each_step_stands_once(tmp_path):
    first = opened(tmp_path)
    for step in range(1, 8):
        first.log({"loss": float(step)}, step)
    first.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "lo')
    second = opened(tmp_path, step=4)
    assert second.rows == [{"step": step, "loss": float(step)} for step in range(1, 5)]
    for step in range(5, 10):
        second.log({"loss": -float(step)}, step)
    second.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    assert read_rows(tmp_path / "metrics.jsonl")[4]["loss"] == -5.0


def test_a_line_that_lacks_only_its_end_is_torn_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}')
    logger = opened(tmp_path, step=2)
    logger.log({"x": 3.0}, 3)
    logger.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 3]


def test_zeros_left_by_a_machine_that_went_down_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "x": 1.0}\n' + b"\0" * 4096)
    logger = opened(tmp_path, step=5)
    logger.log({"x": 2.0}, 6)
    logger.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 6]


def test_a_start_from_zero_keeps_what_was_there_under_another_name(tmp_path):
    for value in (1.0, 2.0, 3.0):
        logger = opened(tmp_path)
        assert logger.rows == []
        logger.log({"x": value}, 1)
        logger.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "x": 3.0}]
    assert read_rows(tmp_path / "metrics.1.jsonl") == [{"step": 1, "x": 1.0}]
    assert read_rows(tmp_path / "metrics.2.jsonl") == [{"step": 1, "x": 2.0}]


def test_a_resume_in_a_new_directory_starts_an_empty_file(tmp_path):
    logger = opened(tmp_path / "new", step=100)
    assert logger.rows == []
    logger.log({"x": 1.0}, 101)
    assert read_rows(tmp_path / "new" / "metrics.jsonl") == [{"step": 101, "x": 1.0}]


def test_arrays_go_to_a_file_of_their_own_and_large_ones_by_their_shape(tmp_path):
    logger = opened(tmp_path)
    logger.log({"loss": 1.0}, 5)
    logger.log_arrays(
        {
            "confusion": torch.tensor([[3, 1], [0, 4]]),
            "big": np.zeros((200, 200)),
            "name": "x",
            "odd": np.array([1.0, np.nan]),
        },
        5,
    )
    logger.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 1.0}]
    (row,) = read_rows(tmp_path / "metrics.arrays.jsonl")
    assert row["confusion"] == [[3, 1], [0, 4]]
    assert row["big"] == "ndarray of shape (200, 200)"
    assert math.isnan(row["odd"][1])
    again = opened(tmp_path, step=4)
    again.log_arrays({"confusion": [[1]]}, 6)
    again.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.arrays.jsonl")] == [6]


def test_hparams_of_any_kind_become_strict_json(tmp_path):
    opened(
        tmp_path,
        lr=1e-3,
        path=Path("a/b"),
        none=None,
        nested={"x": [1, math.nan], 3: (True,)},
        dtype=torch.bfloat16,
        cls=nn.Linear,
        module=nn.Linear(2, 2),
        weights=torch.ones(2),
    )
    kept = strict((tmp_path / "hparams.json").read_text())
    assert kept == {
        "lr": 1e-3,
        "path": "a/b",
        "none": None,
        "nested": {"x": [1, "nan"], "3": [True]},
        "dtype": "torch.bfloat16",
        "cls": "torch.nn.modules.linear.Linear",
        "module": "Linear(in_features=2, out_features=2, bias=True)",
        "weights": [1.0, 1.0],
    }


def test_a_full_disk_leaves_the_logger_out_and_the_others_in(tmp_path):
    full, good = JsonlLogger(), JsonlLogger("other.jsonl")
    loggers = Loggers([full, good])
    loggers.open(tmp_path, 0, {})
    full._file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.warns(LoopkitWarning, match="No space left"):
        loggers.log({"x": 1.0}, 1)
    loggers.log({"x": 2.0}, 2)
    loggers.close()
    assert [row["step"] for row in read_rows(tmp_path / "other.jsonl")] == [1, 2]

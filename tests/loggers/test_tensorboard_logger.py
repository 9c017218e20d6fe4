from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from event_files import events_of, scalars_of, values_of
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from loopkit.errors import LoopkitWarning
from loopkit.loggers.base import Loggers
from loopkit.loggers.tensorboard import TensorBoardLogger


def opened(run_dir: Path, step: int = 0, **hparams: object) -> TensorBoardLogger:
    logger = TensorBoardLogger()
    logger.open(run_dir, step, hparams)
    return logger


def pixels(png: bytes) -> np.ndarray:
    """An RGB picture as this logger writes it."""
    file, at, parts = io.BytesIO(png), 8, {}
    while at < len(png):
        file.seek(at)
        (length,) = struct.unpack(">I", file.read(4))
        kind, data, check = file.read(4), file.read(length), file.read(4)
        assert struct.unpack(">I", check)[0] == zlib.crc32(kind + data)
        parts[kind] = data
        at += 12 + length
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    return rows[:, 1:].reshape(height, width, 3)


def test_scalars_are_in_the_file_when_log_returns(tmp_path):
    logger = opened(tmp_path)
    for step in (10, 20):
        logger.log({"train/loss": 1 / step, "lr": 0.5}, step)
    found = scalars_of(tmp_path / "tensorboard")
    assert found["train/loss"] == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
    assert found["lr"] == [(10, 0.5), (20, 0.5)]
    first = events_of(logger.path)[0]
    assert first.file_version == "brain.Event:2"


def test_after_resumes_each_step_stands_once(tmp_path):
    for start in (0, 4, 4, 6):
        logger = opened(tmp_path, step=start)
        for step in range(start + 1, start + 5):
            logger.log({"x": step + start / 10}, step)
        logger.close()
    points = scalars_of(tmp_path / "tensorboard")["x"]
    assert [step for step, _ in points] == list(range(1, 11))
    assert [value for _, value in points][3:7] == pytest.approx([4.0, 5.4, 6.4, 7.6])


def test_attempts_within_one_second_have_files_of_their_own_that_sort_by_age(tmp_path):
    made = []
    for step in range(5):
        logger = opened(tmp_path, step=step)
        made.append(logger.path.name)
        logger.close()
    assert sorted(made) == made
    assert len(set(made)) == 5


def test_odd_names_and_values_are_taken(tmp_path):
    logger = opened(tmp_path)
    values = {
        "🦊 fox": 1.0,
        "..": 2.0,
        "/lead": 3.0,
        "": 4.0,
        "\ud800": 5.0,
        "nan": math.nan,
        "big": 2**70,
        "bigger": 10**400,
        "most": 1e300,
        "less": -math.inf,
    }
    logger.log(values, 1)
    logger.close()
    found = {name: points[0][1] for name, points in scalars_of(tmp_path / "tensorboard").items()}
    assert found["🦊 fox"] == 1.0
    assert (found[".."], found["lead"], found["unnamed"], found["?"]) == (2.0, 3.0, 4.0, 5.0)
    assert math.isnan(found["nan"])
    assert found["big"] == pytest.approx(2.0**70)
    assert (found["bigger"], found["most"], found["less"]) == (math.inf, math.inf, -math.inf)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_a_hundred_thousand_names_are_taken(tmp_path):
    logger = opened(tmp_path)
    logger.log({f"name/{number}": 1.0 for number in range(100_000)}, 1)
    logger.close()
    assert len(scalars_of(tmp_path / "tensorboard")) == 100_000


def test_scalars_are_read_without_touching_a_tensor(tmp_path, monkeypatch):
    logger = opened(tmp_path)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a tensor was read"))
    logger.log({"x": 1.0}, 1)


def test_hparams_belong_to_the_run_itself_flat_and_typed(tmp_path):
    logger = opened(tmp_path, lr=0.5, name="digits", deep={"on": True, "sizes": [1, 2]}, none=None)
    logger.close()
    assert [path.is_file() for path in (tmp_path / "tensorboard").iterdir()] == [True]
    metadata = {
        value.tag: value.metadata.plugin_data for _, value in values_of(tmp_path / "tensorboard")
    }
    started = HParamsPluginData.FromString(
        metadata["_hparams_/session_start_info"].content
    ).session_start_info
    kinds = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()
    }
    assert kinds == {
        "lr": 0.5,
        "name": "digits",
        "deep/on": True,
        "deep/sizes": "[1, 2]",
        "none": "None",
    }
    assert metadata["_hparams_/session_end_info"].plugin_name == "hparams"


def test_a_matrix_is_a_picture_from_white_to_blue(tmp_path):
    logger = opened(tmp_path)
    logger.log_arrays({"eval/confusion": torch.tensor([[10.0, 0.0], [math.nan, 5.0]])}, 3)
    (step, value), *_ = [
        (s, v) for s, v in values_of(tmp_path / "tensorboard") if v.HasField("image")
    ]
    picture = pixels(value.image.encoded_image_string)
    assert (step, value.tag) == (3, "eval/confusion")
    assert picture.shape == (value.image.height, value.image.width, 3) == (256, 256, 3)
    corners = [tuple(picture[y, x]) for y in (0, -1) for x in (0, -1)]
    assert corners == [(8, 48, 107), (255, 255, 255), (160, 160, 160), (132, 152, 181)]


@pytest.mark.parametrize(
    "matrix",
    [
        np.full((3, 3), np.nan),
        np.zeros((2, 2)),
        np.array([[1e308, -1e308]]),
        np.ones((3000, 5)),
        np.array([[np.inf, 1.0]]),
    ],
)
def test_any_matrix_makes_a_picture(tmp_path, matrix):
    logger = opened(tmp_path)
    logger.log_arrays({"m": matrix}, 1)
    (value,) = [v for _, v in values_of(tmp_path / "tensorboard") if v.HasField("image")]
    assert max(pixels(value.image.encoded_image_string).shape) <= 1024


def test_a_vector_is_a_histogram_of_its_finite_values(tmp_path):
    logger = opened(tmp_path)
    with pytest.warns(LoopkitWarning, match=r"'cube' has the shape \(2, 2, 2\)"):
        logger.log_arrays(
            {
                "f1": np.array([0.0, 0.5, 1.0, np.nan]),
                "none": np.array([np.nan]),
                "empty": np.zeros(0),
                "text": "words",
                "cube": np.zeros((2, 2, 2)),
            },
            2,
        )
    (value,) = [v for _, v in values_of(tmp_path / "tensorboard") if v.HasField("histo")]
    histogram = value.histo
    assert (value.tag, histogram.num, histogram.min, histogram.max, histogram.sum) == (
        "f1",
        3,
        0.0,
        1.0,
        1.5,
    )
    assert sum(histogram.bucket) == 3
    assert len(histogram.bucket) == len(histogram.bucket_limit)


def test_a_full_disk_ends_the_logger_and_blocks_nothing(tmp_path):
    logger = TensorBoardLogger()
    loggers = Loggers([logger])
    loggers.open(tmp_path, 0, {})
    logger._file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.warns(LoopkitWarning, match="No space left"):
        loggers.log({"x": 1.0}, 1)
    for step in range(2, 100):
        loggers.log({"x": 1.0}, step)
    loggers.close()

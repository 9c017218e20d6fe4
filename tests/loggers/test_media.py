"""Images, figures, texts, histograms and audio: from hooks and tasks to each logger that takes them."""

from __future__ import annotations

import io
import wave
from functools import partial
from pathlib import Path

import event_files
import numpy as np
import pytest
import torch
from PIL import Image

from loopkit import Checkpoint, Fit
from loopkit.errors import LoopkitWarning, OptionError
from loopkit.loggers.base import Logger
from loopkit.loggers.media import Media
from loopkit.loggers.tensorboard import TensorBoardLogger
from tests.support import Tiny


def run(tmp_path, task=None, *, event="fit_end", action=None, loggers=("tensorboard",), **options):
    fit = Fit(
        **{"steps": 3, "run_dir": tmp_path / "run", "progress": False, "checkpoint": False}
        | {"loggers": loggers, "eval_every": "never", "log_every": 2}
        | options
    )
    if action is not None:
        fit.on(event, lambda run, *rest: action(run))
    return fit.run(task or Tiny())


def values(tmp_path: Path) -> dict[str, list]:
    found: dict[str, list] = {}
    for step, value in event_files.values_of(tmp_path / "run" / "tensorboard"):
        found.setdefault(value.tag, []).append((step, value))
    return found


def pixels(value) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))


RGB = torch.rand(3, 5, 8, generator=torch.Generator().manual_seed(1))
WANTED = (RGB.permute(1, 2, 0) * 255).round().byte().numpy()
IMAGES = {
    "floats, channels first": (RGB, WANTED),
    "channels last": (RGB.permute(1, 2, 0).numpy(), WANTED),
    "bytes": (torch.from_numpy(WANTED), WANTED),
    "grey": (RGB[0], WANTED[..., :1].repeat(3, 2)),
    "one channel": (RGB[:1], WANTED[..., :1].repeat(3, 2)),
    "half, needing a gradient": (RGB.bfloat16().requires_grad_(), None),
    "out of range": (
        RGB * 3 - 1,
        (RGB * 3 - 1).clip(0, 1).permute(1, 2, 0).mul(255).round().byte().numpy(),
    ),
    "not finite": (torch.full((3, 2, 2), float("nan")), np.zeros((2, 2, 3), np.uint8)),
    "yes and no": (RGB[0] > 0.5, (RGB[0] > 0.5).numpy()[..., None].repeat(3, 2) * np.uint8(255)),
    "integers": (torch.arange(12).reshape(3, 4) * 30, None),
    "PIL": (Image.fromarray(WANTED), np.dstack([WANTED, np.full((5, 8), 255, np.uint8)])),
    "PIL of three rows": (Image.fromarray(WANTED[:3]), None),
    "transparent": (torch.rand(4, 5, 8), None),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_of_any_form_is_in_the_file_at_its_step(name, tmp_path):
    image, wanted = IMAGES[name]
    run(tmp_path, action=lambda run: run.log_image("samples/first", image))
    ((step, value),) = values(tmp_path)["samples/first"]
    assert step == 3
    found = pixels(value)
    assert (value.image.height, value.image.width) == found.shape[:2]
    if wanted is not None:
        assert np.array_equal(found, wanted)


def test_a_figure_a_text_a_histogram_and_audio_are_in_the_file(tmp_path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(2, 1), dpi=50)
    axes.plot([1, 2])
    sound = torch.stack([torch.linspace(-1, 1, 50), torch.zeros(50)])

    def action(run):
        run.log_figure("curve", figure)
        run.log_text("said", "a **b** ü")
        run.log_histogram("weights", run.task.net[0].weight)
        run.log_audio("sound", sound, 8000)

    run(tmp_path, action=action)
    every = values(tmp_path)
    found = {name: every[name][0][1] for name in ("curve", "said", "weights", "sound")}
    assert pixels(found["curve"]).shape == (50, 100, 4)
    assert len(np.unique(pixels(found["curve"]))) > 5
    assert not pyplot.fignum_exists(figure.number)
    assert found["said"].tensor.string_val == ["a **b** ü".encode()]
    assert found["said"].metadata.plugin_data.plugin_name == "text"
    assert found["weights"].histo.num == 128
    with wave.open(io.BytesIO(found["sound"].audio.encoded_audio_string)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 50)
        frames = np.frombuffer(file.readframes(50), "<i2").reshape(50, 2)
    assert frames[:, 0].tolist() == (sound[0].numpy() * 32767.99).astype(np.int16).tolist()
    assert not frames[:, 1].any()


class Drawing(Tiny):
    """Logs from each of its methods."""

    def train_step(self, batch):
        self.log_image("train/batch", torch.rand(3, 4, 4))
        self.log_histogram("train/inputs", batch[0])
        return super().train_step(batch)

    def eval_step(self, batch):
        self.log_text("eval/said", "text")
        return super().eval_step(batch)

    def on_step_end(self, run, out):
        self.log_histogram("weights", self.net[0].weight)


def test_a_task_logs_from_its_steps_and_events_as_it_logs_scalars(tmp_path):
    run(tmp_path, Drawing(), eval_every="1 epoch", batch_size=30, steps=None, epochs=2)
    found = values(tmp_path)
    assert [step for step, _ in found["train/batch"]] == [1, 2, 4]  # with each row
    assert [step for step, _ in found["eval/said"]] == [2, 4]
    assert [step for step, _ in found["weights"]] == [1, 2, 3, 4]
    task = Drawing()
    task.train_step(task.train_data()[:4])  # by hand
    Fit(progress=False).evaluate(task)
    assert task.log_collector.media == {} or set(task.log_collector.media) == {"eval/said"}
    run(tmp_path / "next", task)
    assert "eval/said" not in values(tmp_path / "next")


def test_the_value_is_that_of_the_moment_it_was_logged(tmp_path):
    class Changing(Tiny):
        def train_step(self, batch):
            self.picture = torch.zeros(3, 2, 2)
            self.log_image("picture", self.picture)
            self.picture += 1
            return super().train_step(batch)

    run(tmp_path, Changing())
    assert all(not pixels(value).any() for _, value in values(tmp_path)["picture"])


def test_after_a_resume_each_step_has_its_image_once(tmp_path):
    def action(run, stop):
        run.log_image("image", torch.rand(3, 2, 2))
        if run.progress.step == stop:
            run.stop("x")

    for stop in (2, None):
        run(
            tmp_path,
            event="step_end",
            action=partial(action, stop=stop),
            steps=4,
            checkpoint=Checkpoint(background=False),
            resume="auto",
        )
    assert [step for step, _ in values(tmp_path)["image"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (
            lambda run: run.log_image("x", torch.rand(2, 3, 5, 5)),
            r"log_image\('x'\) got an array of shape \(2, 3, 5, 5\): .*make_grid",
        ),
        (
            lambda run: run.log_image("x", torch.rand(5, 5, 5)),
            r"shape \(5, 5, 5\): give \[C, H, W\]",
        ),
        (lambda run: run.log_image("x", torch.rand(3, 0, 5)), r"shape \(3, 0, 5\)"),
        (lambda run: run.log_image("x", "cat.png"), "got a str: give a tensor or an array"),
        (lambda run: run.log_text("x", 5), r"log_text\('x'\) got a int: give a string"),
        (
            lambda run: run.log_figure("x", 5),
            r"log_figure\('x'\) got a int: give a figure of matplotlib",
        ),
        (
            lambda run: run.log_audio("x", torch.rand(5), 0),
            "sample_rate=0: give samples per second",
        ),
        (
            lambda run: run.log_audio("x", torch.rand(1, 2, 5), 8000),
            r"shape \(1, 2, 5\): give samples",
        ),
        (lambda run: run.logger("wandb"), r"run.logger\('wandb'\): this run has .*tensorboard"),
    ],
)
def test_what_is_no_picture_text_or_sound_is_an_error(action, said, tmp_path):
    with pytest.raises(OptionError, match=said):
        run(tmp_path, action=action)


def test_where_no_logger_takes_a_kind_that_is_reported_once(tmp_path):
    def action(run):
        run.log_image("image", torch.rand(3, 2, 2))
        run.log_image("other", torch.rand(3, 2, 2))

    with pytest.warns(
        LoopkitWarning, match="JsonlLogger, CsvLogger takes no image: 'image'"
    ) as told:
        result = run(tmp_path, event="step_end", action=action, loggers=("jsonl", "csv"))
    assert (result.status, len(told)) == ("finished", 1)
    run(tmp_path / "both", event="step_end", action=action, loggers=("jsonl", "tensorboard"))
    run(tmp_path / "none", event="step_end", action=action, loggers=None)


def test_a_logger_of_ones_own_takes_the_kinds_that_it_names(tmp_path):
    got = []

    class Texts(Logger):
        media = ("text",)

        def log_media(self, media, step):
            got.append((media.name, media.value, step))

    def action(run):
        run.log_text("said", "a")
        run.log_image("image", torch.rand(3, 2, 2))

    with pytest.warns(LoopkitWarning, match="Texts takes no image"):
        run(tmp_path, action=action, loggers=("jsonl", "tensorboard", Texts()))
    assert got == [("said", "a", 3)]


def test_tensorboards_own_writer_writes_into_the_same_file(tmp_path):
    def action(run):
        writer = run.logger("tensorboard").experiment
        writer.add_scalar("own", 2.5, global_step=run.progress.step)
        writer.add_image("picture", RGB.numpy(), global_step=run.progress.step)
        writer.add_histogram("h", np.arange(5.0), run.progress.step)
        assert run.logger("TensorBoardLogger").experiment is writer

    run(tmp_path, event="step_end", action=action)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    found = values(tmp_path)
    assert [(step, value.simple_value) for step, value in found["own"]] == [
        (1, 2.5),
        (2, 2.5),
        (3, 2.5),
    ]
    assert [step for step, _ in found["picture"]] == [1, 2, 3]
    assert [step for step, _ in found["h"]] == [1, 2, 3]


def test_a_logger_that_failed_does_nothing_in_the_hooks_that_use_it(tmp_path):
    class Fails(TensorBoardLogger):
        def log(self, values, step):
            raise OSError("no space left")

    def action(run):
        run.logger("tensorboard").experiment.add_scalar("own", 1.0, 1)

    with pytest.warns(LoopkitWarning, match="Fails failed in log"):
        result = run(tmp_path, action=action, loggers=("jsonl", Fails()))
    assert result.status == "finished"


def test_a_full_disk_drops_the_logger_and_not_the_hook(tmp_path, monkeypatch):
    def action(run):
        logger = run.logger("tensorboard")
        if run.progress.step == 1:
            monkeypatch.setattr(logger, "_file", Full())
        logger.experiment.add_scalar("own", 1.0, run.progress.step)

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError("no space left")

    with pytest.warns(
        LoopkitWarning, match="TensorBoardLogger failed in log and .* OSError: no space"
    ):
        result = run(tmp_path, event="step_end", action=action, loggers=("jsonl", "tensorboard"))
    assert (result.status, result.step) == ("finished", 3)


def test_an_array_that_tensorboard_cannot_draw_is_reported_once(tmp_path):
    logger = TensorBoardLogger()
    logger.open(tmp_path, 0, {})
    with pytest.warns(LoopkitWarning, match=r"'counts' has the shape \(2, 2, 2\)"):
        logger.log_arrays({"counts": np.zeros((2, 2, 2))}, 1)
    logger.log_arrays({"counts": np.zeros((2, 2, 2))}, 2)
    logger.close()


def test_a_sparse_or_complex_value_makes_a_histogram():
    for value in (
        torch.eye(3).to_sparse(),
        torch.complex(torch.eye(3), torch.eye(3)),
        [1, 2.5],
        np.float16(2),
    ):
        assert Media("histogram", "h", value).converted().value.dtype == np.float64
    assert Media(
        "histogram", "h", torch.tensor([1.0, float("nan")])
    ).converted().value.tolist() == [1.0]

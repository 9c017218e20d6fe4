"""The tasks on images: they learn what a baseline does not, on ranks too, and survive kill -9."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from PIL import Image

from loopkit.errors import CheckpointError, DataError, OptionError
from loopkit.hooks import EMA, Unfreeze
from tests.support import quiet
from tests.tasks.image_jobs import NAMES, made, train, train_on_ranks, write_digits

transformers = pytest.importorskip("transformers")

from tasks import contrastive, diffusion, distill, images  # noqa: E402
from tasks.image_data import (  # noqa: E402
    class_names,
    labelled_images,
    photo_patches,
    recut,
    warped,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_it_ends_with_the_same_bits(rank_programs, name, tmp_path):
    whole = train(name, tmp_path / "whole")
    words = [sys.executable, "-m", "tests.tasks.image_jobs", name, str(tmp_path / "killed"), "7"]
    assert rank_programs.Popen(words, cwd=ROOT).wait(timeout=120) == -signal.SIGKILL
    kept = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert kept[-1].endswith("6")
    assert train(name, tmp_path / "killed") == whole


@pytest.mark.parametrize(
    ("name", "strategy"), [*((name, "ddp") for name in NAMES), ("contrastive", "fsdp")]
)
def test_two_ranks_have_the_metrics_of_one_process(pair, name, strategy):
    # A contrastive loss is of a batch: that of both ranks is one. Others accumulate.
    parts = {"batch_size": 16} if name == "contrastive" else {"batch_size": 8, "accumulate": 2}
    (first, weights), (second, same) = pair.call(train_on_ranks, name, strategy, batch_size=8)
    alone, expected = train_on_ranks(name, "single", **parts)
    assert first == second == pytest.approx(alone, abs=0.01)
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-4)
        assert torch.equal(weights[key], same[key])


def test_images_learn_and_a_pretrained_body_waits_for_its_time(tmp_path):
    torch.manual_seed(0)
    first = images.Images(augment="none", width=32, layers=1, most=30, lr=1e-2)
    fit = quiet(epochs=10, batch_size=16, eval_every="10 epochs", run_dir=tmp_path / "first",
                checkpoint=True)  # fmt: skip
    result = fit.run(first)
    assert result.metrics["eval/accuracy"] > 0.4  # one class for all: 0.1
    folder = result.export(tmp_path / "model")
    opened = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image, label = labelled_images(None, held_out=True)[0]
    pixels = processor((image * 255).byte(), return_tensors="pt")["pixel_values"]
    assert torch.equal(opened.eval()(pixels).logits, first.eval().model(pixels).logits)
    assert opened.config.id2label[label] == class_names(None)[label]

    data = write_digits(tmp_path / "data", [3, 7], 20)
    task = images.Images(data, str(folder), "cut", lr=1e-3)
    assert task.model.config.id2label == {0: "digit 3", 1: "digit 7"}
    body = {n: p.detach().clone() for n, p in task.model.vit.named_parameters()}
    head = task.model.classifier.weight.detach().clone()
    moved = []

    def record(run, out):
        now = task.model.vit.state_dict()
        moved.append(not all(torch.equal(now[name], kept) for name, kept in body.items()))

    fit = quiet(epochs=2, batch_size=16, hooks=[Unfreeze({"1 epoch": task.body})])
    fit.on("step_end", record)
    fit.run(task)
    assert moved == [False, False, True, True]
    assert not torch.equal(task.model.classifier.weight, head)


def test_the_teacher_makes_the_student_better_and_is_not_saved(tmp_path):
    accuracy = []
    for alpha in (0.0, 0.9):
        torch.manual_seed(0)
        task = distill.Distill(alpha=alpha, width=4)
        fit = quiet(epochs=4, eval_every="4 epochs", run_dir=tmp_path / str(alpha), checkpoint=True)
        result = fit.run(task)
        accuracy.append(result.metrics["eval/accuracy"])
    assert accuracy[1] > accuracy[0] + 0.1
    assert result.metrics["eval/teacher/accuracy"] > 0.98
    assert {name.split(".")[0] for name in task.state_dict()} == {"student"}
    again = distill.Distill.load(result.checkpoint)
    batch = task.eval_data()[:50]
    assert torch.equal(again.eval_step(batch)["preds"], task.eval().eval_step(batch)["preds"])
    other = write_digits(tmp_path / "data", range(10), 10)
    with pytest.raises(CheckpointError, match=r"learned from another teacher"):
        quiet(resume=result.checkpoint).run(distill.Distill(other, size=8, width=4))


def test_a_folder_is_a_teacher_if_it_knows_the_classes(tmp_path):
    data = write_digits(tmp_path / "data", [3, 7], 10)
    teacher = images.Images(data, size=8, width=16, layers=1)
    teacher.model.save_pretrained(tmp_path / "model")
    teacher.tokenizer.save_pretrained(tmp_path / "model")
    task = distill.Distill(data, str(tmp_path / "model"), size=8, labelled=2)
    pixels = torch.stack([row["pixel_values"] for row in teacher.eval_data().dataset])
    with torch.no_grad():
        expected = teacher.model.eval()(pixels).logits
    torch.testing.assert_close(task.teach(task.eval_data().tensors[0]), expected)
    assert (task.train_data().tensors[1] >= 0).sum() == 4
    assert "soft" in task.train_step(task.train_data()[:])
    with pytest.raises(
        OptionError, match=r"knows the classes digit 3, digit 7, and the data has 0, 1"
    ):
        distill.Distill(None, str(tmp_path / "model"))


def test_diffusion_makes_images_of_the_class_that_is_asked_for():
    torch.manual_seed(0)
    task = diffusion.Diffusion(width=16, sampling_steps=8, lr=6e-3)
    fit = quiet(epochs=8, batch_size=64, eval_every="8 epochs", hooks=[EMA(0.95, warmup=True)])
    noise = fit.evaluate(task)
    made = fit.run(task).metrics
    assert made["eval/accuracy"] > 0.2 > 2 * noise["eval/accuracy"]
    assert made["eval/loss"] < 0.25 < 0.9 < noise["eval/loss"]
    assert made["eval/distance"] < 0.5 * noise["eval/distance"]


def test_cuts_of_one_photo_are_found_again():
    torch.manual_seed(0)
    task = contrastive.Contrastive(width=8)
    fit = quiet(epochs=3, batch_size=64, eval_every="3 epochs", clip_norm=1.0)
    kept = [p.clone() for p in task.teacher.parameters()]
    metrics = fit.run(task).metrics
    assert metrics["eval/found"] > 1.5 * metrics["eval/pixels/found"] > 1.5 / 104
    assert not any(map(torch.equal, kept, task.teacher.parameters()))
    assert not any(p.requires_grad for p in task.teacher.parameters())


def test_one_step_moves_the_teacher_by_the_formula():
    task = made("contrastive")
    task.decay = 0.75
    before = [p.clone() for p in task.teacher.parameters()]
    quiet(steps=1, batch_size=4, accumulate=2, eval_every="never").run(task)
    for old, kept, new in zip(before, task.teacher.parameters(), task.encoder.parameters()):
        torch.testing.assert_close(kept, 0.75 * old + 0.25 * new)


def test_folders_are_read_and_what_is_wrong_with_them_is_named(tmp_path):
    data = write_digits(tmp_path / "data", [1, 2], 10)
    held = labelled_images(data, held_out=True, size=4, channels=1)
    assert [held[i][1] for i in range(len(held))] == [0, 0, 1, 1]
    assert held[0][0].shape == (1, 4, 4)
    assert len(labelled_images(data, held_out=False)) == 16
    for nothing in (tmp_path / "none", tmp_path / "data" / "digit 1"):
        with pytest.raises(DataError, match="does not hold images by class"):
            class_names(str(nothing))
    (tmp_path / "data" / "digit 1" / "001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"001\.png is no image that Pillow reads"):
        labelled_images(data, held_out=False)[1]
    with pytest.raises(DataError, match=r"none gives no patch"):
        photo_patches(str(tmp_path / "none"), held_out=True)
    with pytest.raises(OptionError, match="augment='wrap': give one of none, warp, cut"):
        images.Images(augment="wrap")
    with pytest.raises(OptionError, match="must be even"):
        diffusion.Diffusion(size=7)
    with pytest.raises(OptionError, match="temperature=0: give a number above 0"):
        distill.Distill(temperature=0)


def test_patches_for_evaluation_share_no_pixel_with_the_others(tmp_path):
    width = torch.arange(200).repeat(40, 1).byte().numpy()
    Image.fromarray(width).save(tmp_path / "photo.png")
    train, held = (photo_patches(str(tmp_path), held_out=held) for held in (False, True))
    columns = [set((part * 255).round().int().flatten().tolist()) for part in (train, held)]
    assert columns == [set(range(128)), set(range(128, 160))]


def test_augmentation_keeps_the_shape_and_follows_the_seed():
    image = torch.rand(3, 12, 20)
    for change, shape in ((warped, (3, 12, 20)), (recut, (3, 12, 20))):
        torch.manual_seed(1)
        first, second = change(image), change(image)
        torch.manual_seed(1)
        assert torch.equal(change(image), first)
        assert first.shape == shape
        assert not torch.equal(first, second)
    torch.testing.assert_close(warped(image, most=0.0), image)
    assert recut(image, 5).shape == (3, 5, 5)


@pytest.mark.parametrize("task", [contrastive, diffusion, distill, images])
def test_a_script_reports_a_wrong_folder_in_one_line(task, tmp_path, capsys):
    assert task.main(["--data", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} ")


def said(capsys, pattern: str) -> list[float]:
    """Numbers that a script printed."""
    out = capsys.readouterr().out
    found = re.search(pattern, out)
    assert found, out
    return [float(number.rstrip("%")) for number in found.groups()]


@pytest.mark.long
def test_the_scripts_learn_what_their_pages_say(tmp_path, capsys):
    assert diffusion.main(["--picture", "a/made.png"]) == 0
    before, after = said(capsys, r"before: .*; (\d+)% [\s\S]*after: .*; (\d+)%")
    assert before < 10
    assert after > 85
    assert contrastive.main(["--picture", "found.png"]) == 0
    found, pixels = said(capsys, r"all for (\d+)%; by pixels for (\d+)%")
    assert found > 40 > 4 * pixels - 4
    assert distill.main(["--picture", "curves.png"]) == 0
    alone, taught = said(
        capsys, r"alone: accuracy (0\.\d+)[\s\S]*teacher: accuracy (0\.\d+), files"
    )
    assert taught > 0.96 > 0.86 > alone
    assert images.main([]) == 0
    assert said(capsys, r"accuracy (0\.\d+) after")[0] > 0.95
    taught = ["--teacher", "runs/images/1/best", "--size", "8"]
    assert distill.main([*taught, "--epochs", "10"]) == 0
    alone, taught = said(
        capsys, r"alone: accuracy (0\.\d+)[\s\S]*teacher: accuracy (0\.\d+), files"
    )
    assert taught > alone + 0.08
    assert all(Path(name).is_file() for name in ("a/made.png", "found.png", "curves.png"))


@pytest.mark.long
def test_a_pretrained_model_needs_fewer_images(tmp_path):
    few, many = (
        write_digits(tmp_path / name, digits, 200)
        for name, digits in (("few", range(5, 10)), ("many", range(5)))
    )
    assert images.main(["--data", many, "--size", "8", "--epochs", "25"]) == 0
    accuracy = []
    for model in (None, "runs/images/1/best"):
        for seed in range(3):
            torch.manual_seed(seed)
            task = images.Images(few, model, size=8, most=10)
            fit = quiet(
                epochs=40,
                seed=seed,
                batch_size=16,
                clip_norm=1.0,
                eval_every="40 epochs",
                hooks=[Unfreeze({"5 epochs": task.body})] if model else [],
            )
            accuracy.append(fit.run(task).metrics["eval/accuracy"])
    print("from scratch, and fine-tuned:", accuracy)
    scratch, tuned = sum(accuracy[:3]) / 3, sum(accuracy[3:]) / 3
    assert tuned > scratch + 0.04
    assert scratch > 0.4  # one class for all: 0.2

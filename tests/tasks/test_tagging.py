"""The tagging task: it learns its sample and real names, reads CoNLL files, and resumes exactly."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from loopkit import Checkpoint
from loopkit.errors import DataError
from tests.support import digest, quiet

pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'loopkit[hf]'"
)

from tasks.tagging import Tagging, main, read_conll

SMALL = {"width": 32, "layers": 1, "dropout": 0.1, "lr": 5e-3}
REAL = Path(os.environ.get("LOOPKIT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_it_learns_its_sample_and_tags_new_sentences():
    torch.manual_seed(0)
    task = Tagging(**SMALL)
    metrics = quiet(epochs=25, batch_size=8, eval_every="25 epochs").run(task).metrics
    assert metrics["eval/spans/f1"] == metrics["eval/spans/place/recall"] == 1
    assert task.tag(["Ann", "Ray", "works", "in", "New", "York"]) == [
        "B-person", "I-person", "O", "O", "B-place", "I-place",
    ]  # fmt: skip


def test_stopped_and_resumed_is_bit_identical_and_a_checkpoint_is_a_task(tmp_path):
    def run(run_dir, stop_at=None):
        torch.manual_seed(0)
        task = Tagging(**SMALL)
        fit = quiet(
            steps=8,
            batch_size=8,
            run_dir=run_dir,
            resume="auto",
            checkpoint=Checkpoint(every="1000 steps"),
            eval_every=3,
        )
        fit.on("step_end", lambda r, out: r.stop("test") if r.progress.step == stop_at else None)
        fit.run(task)
        return task

    whole = run(tmp_path / "whole")
    run(tmp_path / "part", 5)
    again = run(tmp_path / "part")
    assert digest(again.state_dict()) == digest(whole.state_dict())
    sentence = ["Ann", "lives", "in", "Rome"]
    assert Tagging.load(tmp_path / "part").tag(sentence) == whole.tag(sentence)


def test_conll_files_are_read_with_tabs_and_spaces(tmp_path):
    file = tmp_path / "a.conll"
    file.write_text(
        "-DOCSTART- -X- O\n\nAnn NNP B-per\nran VB O\n \n\nOslo\tB-loc\r\n\u00a0x y\tO\n", "utf-8"
    )
    assert read_conll(file) == [
        [("Ann", "B-per"), ("ran", "O")],
        [("Oslo", "B-loc"), ("\u00a0x y", "O")],
    ]
    file.write_text("Ann B-per\nran\n")
    with pytest.raises(DataError, match=r"a\.conll, line 2: 'ran' has no tag"):
        read_conll(file)
    with pytest.raises(DataError, match="none is not a file"):
        read_conll(tmp_path / "none")


def test_the_first_piece_of_a_word_has_its_tag():
    task = Tagging(**SMALL)
    row = (
        task.eval_data().dataset[0] if hasattr(task.eval_data(), "dataset") else task.eval_data()[0]
    )
    words = task.tokenizer.decode(row["input_ids"]).split()
    assert sum(label != -100 for label in row["labels"]) == len(words)


def test_the_script_trains_and_tags(capsys):
    assert main(["--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "F1 of spans 0." in out
    assert "Ann/" in out
    assert main(["--data", "nowhere"]) == 1
    assert "nowhere is not a file" in capsys.readouterr().err


needs_names = pytest.mark.skipif(
    not (REAL / "wnut17train.conll").is_file(),
    reason="LOOPKIT_DATA names no folder with wnut17train.conll and emerging.dev.conll",
)


@needs_names
def test_a_real_file_trains_and_is_measured(tmp_path):
    lines = (REAL / "wnut17train.conll").read_text("utf-8").split("\n")
    (tmp_path / "part.conll").write_text("\n".join(lines[:2000]), "utf-8")
    torch.manual_seed(0)
    task = Tagging(str(tmp_path / "part.conll"), str(REAL / "emerging.dev.conll"), **SMALL)
    metrics = quiet(steps=5, batch_size=8, eval_every=5).run(task).metrics
    assert set(task.tags) >= {"B-person", "I-location"}
    assert 0 <= metrics["eval/spans/f1"] <= 1


@pytest.mark.long
@needs_names
def test_it_learns_real_names_of_which_all_o_finds_none():
    torch.manual_seed(0)
    task = Tagging(
        str(REAL / "wnut17train.conll"),
        str(REAL / "emerging.dev.conll"),
        width=64,
        dropout=0.2,
        lr=2e-3,
    )
    fit = quiet(epochs=8, clip_norm=1.0, batch_size=16, eval_every="1 epoch")
    found = []
    fit.on("eval_end", lambda run, metrics: found.append(metrics["eval/spans/f1"]))
    fit.run(task)
    assert max(found) > 0.06  # 0 for a tagger that says O

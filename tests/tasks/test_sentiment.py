"""The sentiment task: it learns its sample and real reviews, reads what it says, and what it
exports is transformers'.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from loopkit import Checkpoint
from loopkit.errors import DataError
from tests.support import digest, quiet

transformers = pytest.importorskip("transformers")

from tasks.sentiment import Sentiment, main  # noqa: E402

SMALL = {"width": 16, "layers": 1, "lr": 1e-2}
REVIEWS = Path(os.environ.get("LOOPKIT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_it_learns_its_sample_and_judges_new_sentences():
    torch.manual_seed(0)
    task = Sentiment(**SMALL)
    metrics = quiet(epochs=12, batch_size=16, eval_every="12 epochs").run(task).metrics
    assert metrics["eval/accuracy"] == metrics["eval/f1"] == 1
    good, bad = task.classify(
        ["A moving film with a great cast.", "a dull plot, and a tired ending"]
    )
    assert good > 0.9
    assert bad < 0.1


def test_stopped_and_resumed_is_bit_identical_and_a_checkpoint_is_a_task(tmp_path):
    def run(run_dir, stop_at=None):
        torch.manual_seed(0)
        task = Sentiment(**SMALL)
        fit = quiet(
            steps=8,
            batch_size=8,
            run_dir=run_dir,
            resume="auto",
            checkpoint=Checkpoint(every="1000 steps"),
            eval_every=3,
        )
        fit.on("step_end", lambda r, out: r.stop("test") if r.progress.step == stop_at else None)
        return task, fit.run(task)

    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "part", 5)
    again, result = run(tmp_path / "part")
    assert digest(again.state_dict()) == digest(whole.state_dict())
    loaded = Sentiment.load(tmp_path / "part")
    assert loaded.hparams == {**SMALL, "data": None, "model": None, "workers": 0}
    assert loaded.classify(["a fresh plot"]) == whole.classify(["a fresh plot"])
    tuned = Sentiment(model=str(result.export(tmp_path / "model")), lr=2e-5)
    assert tuned.classify(["a fresh plot"]) == pytest.approx(
        whole.classify(["a fresh plot"]), abs=1e-6
    )


def test_both_kinds_of_corpus_are_read(tmp_path):
    rows = [("good", 1), ("bad, quite bad", 0)] * 10
    (tmp_path / "a.pos").write_text("good\n" * 10 + "\n")
    (tmp_path / "a.neg").write_text("bad, quite bad\n" * 10)
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows)
    )
    counts = []
    for data in (tmp_path, tmp_path / "a.csv"):
        task = Sentiment(str(data), **SMALL)
        held = [row["label"] for row in task.eval_data().dataset]
        assert len(held) == 2
        counts.append(sum(row["label"] for row in task.train_data().dataset) + sum(held))
    assert counts == [10, 10]
    for nothing in (tmp_path / "none", tmp_path / "a.pos"):
        with pytest.raises((DataError, KeyError), match=r"holds no praise and blame|text"):
            Sentiment(str(nothing))


def test_the_script_trains_exports_the_best_and_judges(capsys):
    assert main(["--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert re.match(
        r"F1 0\.\d{3} after \d+ steps\nopens with from_pretrained: runs/sentiment/1/best\n0\.\d\d  a moving",
        out,
    )
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(
        "runs/sentiment/1/best"
    )
    assert opened.num_labels == 2
    assert main(["--data", "nowhere"]) == 1
    assert "nowhere holds no praise and blame" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.skipif(
    not (REVIEWS / "rt-polarity.pos").is_file(),
    reason="LOOPKIT_DATA names no folder with rt-polarity.pos and .neg",
)
def test_it_learns_real_reviews():
    torch.manual_seed(0)
    metrics = (
        quiet(epochs=2, eval_every="2 epochs", clip_norm=1.0, batch_size=32)
        .run(Sentiment(str(REVIEWS)))
        .metrics
    )
    assert metrics["eval/accuracy"] > 0.74
    assert metrics["eval/f1"] > 0.74

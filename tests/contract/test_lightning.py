"""LightningModules on several ranks: the training of one process, and an exact resume."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from tests.contract import lightning_jobs as jobs


def same_rows(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, rel=1e-6, abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*training_step returned None")
@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("ddp", "classifier"),
        ("ddp", "autoencoder"),
        ("fsdp", "classifier"),
        ("fsdp", "autoencoder"),
        ("ddp", "skips"),
    ],
)
def test_two_ranks_train_like_one_process_that_accumulates(pair, strategy, name):
    alone = jobs.train("single", name, accumulate=2)
    for rank, found in enumerate(pair.call(jobs.train, strategy, name)):
        for key, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][key], value, rtol=1e-9, atol=1e-12)
        assert found["rank"] == rank
        assert found["seen"] == (*alone["seen"][:2], 2)
        same_rows(found["rows"], alone["rows"])


def test_two_ranks_train_by_hand_like_one_process_with_larger_batches(pair):
    alone = jobs.train("single", "by hand", size=16)
    for found in pair.call(jobs.train, "ddp", "by hand", size=8):
        for key, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][key], value, rtol=1e-9, atol=1e-12)
        assert found["seen"][:2] == alone["seen"][:2]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("ddp", "gan"), ("ddp", "by hand"), ("ddp", "classifier"), ("fsdp", "classifier")],
)
def test_the_ranks_keep_the_same_weights_and_end_with_the_same_bits(pair, strategy, name, tmp_path):
    whole = pair.call(jobs.train, strategy, name, run_dir=tmp_path / "whole", checkpoint=True)
    pair.call(jobs.train, strategy, name, stop_at=5, run_dir=tmp_path / "run", checkpoint=True)
    resumed = pair.call(
        jobs.train, strategy, name, run_dir=tmp_path / "run", checkpoint=True, resume="auto"
    )
    for found in resumed:
        for key, value in whole[0]["weights"].items():
            assert torch.equal(found["weights"][key], value), key
        assert found["values"] == whole[0]["values"] or name != "classifier"
        assert found["seen"] == whole[0]["seen"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resume_on_another_number_of_ranks_keeps_metrics_and_averages(pair, strategy, tmp_path):
    saves = {"run_dir": tmp_path / "run", "checkpoint": True}
    alone = jobs.train("single", "classifier", accumulate=2)
    pair.call(jobs.train, strategy, "classifier", stop_at=5, **saves)
    resumed = [jobs.train("single", "classifier", accumulate=2, resume="auto", **saves)]
    jobs.train(
        "single", "classifier", accumulate=2, stop_at=5, run_dir=tmp_path / "more", checkpoint=True
    )
    saves["run_dir"] = tmp_path / "more"
    resumed += pair.call(jobs.train, strategy, "classifier", resume="auto", **saves)
    for found in resumed:
        assert found["values"] == pytest.approx(alone["values"], rel=1e-6)
        for key, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("strategy", "name", "reason"),
    [
        ("fsdp", "gan", "OptionError.*several backward passes.*strategy='ddp'"),
        ("zero2", "classifier", "OptionError.*by DDP and FSDP.*strategy='ddp'"),
        ("fsdp", "skips all", "TaskError.*returned None, which skips a batch, and FSDP needs"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(pair, strategy, name, reason):
    with pytest.raises(AssertionError, match=reason):
        pair.call(jobs.train, strategy, name, precision="fp32")

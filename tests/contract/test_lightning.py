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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["classifier", "autoencoder"])
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


@pytest.mark.parametrize("name", ["gan", "by hand", "classifier"])
def test_the_ranks_keep_the_same_weights_and_end_with_the_same_bits(pair, name, tmp_path):
    whole = pair.call(jobs.train, "ddp", name, run_dir=tmp_path / "whole", checkpoint=True)
    pair.call(jobs.train, "ddp", name, stop_at=5, run_dir=tmp_path / "run", checkpoint=True)
    resumed = pair.call(
        jobs.train, "ddp", name, run_dir=tmp_path / "run", checkpoint=True, resume="auto"
    )
    for found in resumed:
        for key, value in whole[0]["weights"].items():
            assert torch.equal(found["weights"][key], value), key
        assert found["values"] == whole[0]["values"] or name != "classifier"
        assert found["seen"] == whole[0]["seen"]


def test_a_resume_on_another_number_of_ranks_keeps_metrics_and_averages(pair, tmp_path):
    alone = jobs.train("single", "classifier", accumulate=2)
    pair.call(jobs.train, "ddp", "classifier", stop_at=5, run_dir=tmp_path, checkpoint=True)
    resumed = jobs.train(
        "single", "classifier", accumulate=2, run_dir=tmp_path, checkpoint=True, resume="auto"
    )
    assert resumed["values"] == pytest.approx(alone["values"], rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "name", "reason"),
    [("fsdp", "gan", "several backward passes"), ("zero2", "classifier", "by DDP and FSDP")],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(pair, strategy, name, reason):
    with pytest.raises(AssertionError, match=rf"OptionError.*{reason}.*strategy='ddp'"):
        pair.call(jobs.train, strategy, name, precision="fp32")

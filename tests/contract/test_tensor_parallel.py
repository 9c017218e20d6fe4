"""TensorParallel: layers split over a tensor-parallel group, alone and with FSDP over groups."""

from __future__ import annotations

import pytest
import torch

from loopkit import Checkpoint
from loopkit.checkpoint import load_snapshot
from tests.contract import coordination_jobs, fsdp_jobs, jobs, tensor_parallel_jobs
from tests.contract.tasks import TokenClassifier
from tests.contract.test_training import distance

SAVE = Checkpoint(every="1000 steps", background=False)
OPTIONS = {
    "batch_size": 4,
    "accumulate": 2,
    "epochs": 2,
    "eval_every": "3 steps",
    "log_every": "3 steps",
    "clip_norm": 0.5,
}
# Two tensor-parallel groups of two ranks, and FSDP over the groups.
MIXED = ("TensorParallel", {"plan": jobs.WORDS, "size": 2})
WHOLE = ("TensorParallel", {"plan": jobs.WHOLE_WORDS})


@pytest.mark.parametrize("strategy", ["tensor", WHOLE])
def test_two_ranks_that_split_layers_train_as_one_does(pair, strategy):
    first, second = pair.call(jobs.train, strategy, "words", **OPTIONS)
    alone = jobs.train("single", "words", **OPTIONS)
    assert first["digest"] == second["digest"]
    assert first["names"] == alone["names"]
    assert first["losses"] == second["losses"]
    assert first["progress"] == second["progress"] == alone["progress"]
    assert distance(first["model"], alone["model"]) < 5e-7
    assert distance(first["optimizer"], alone["optimizer"]) < 5e-7
    for mine, theirs in zip(first["rows"], alone["rows"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_tensor_parallel_groups_share_the_data_and_shard_over_each_other(pool):
    ranks = pool(4).call(jobs.train, MIXED, "words", **OPTIONS)
    alone = jobs.train("single", "words", **{**OPTIONS, "accumulate": 4})
    assert len({each["digest"] for each in ranks}) == 1
    assert ranks[0]["progress"] == alone["progress"]
    assert distance(ranks[0]["model"], alone["model"]) < 5e-7
    for mine, theirs in zip(ranks[0]["rows"], alone["rows"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_norms_on_a_split_sequence_get_the_sum_of_their_gradients(pair):
    for found, expected in pair.call(tensor_parallel_jobs.split_sequence):
        assert distance(found, expected) < 1e-6


def test_each_rank_holds_its_part(pair, pool):
    for told in pair.call(tensor_parallel_jobs.parts, WHOLE):
        assert told["up"] == told["whole"] / 2
        assert told["norm"] == told["norm whole"]
    for told in pool(4).call(tensor_parallel_jobs.parts, MIXED):
        assert told["up"] == told["whole"] / 4
        assert told["norm"] == told["norm whole"] / 2


@pytest.mark.parametrize(("strategy", "stops"), [("tensor", (2, 6, 7)), (WHOLE, (5,))])
def test_resume_from_every_step_is_identical(pair, tmp_path, strategy, stops):
    options = {**OPTIONS, "loggers": "jsonl", "task": "words"}
    assert pair.call(jobs.resume_everywhere, strategy, tmp_path, stops, **options) == [[], []]


def test_two_tensor_parallel_groups_resume_where_they_were(pool, tmp_path):
    options = {**OPTIONS, "accumulate": 1, "loggers": "jsonl", "task": "words"}
    assert pool(4).call(jobs.resume_everywhere, MIXED, tmp_path, (5,), **options) == [[]] * 4


@pytest.mark.parametrize(("other", "size"), [("single", 1), ("fsdp", 2), (MIXED, 4)])
def test_a_run_resumes_elsewhere_from_the_state_it_had(pool, tmp_path, other, size):
    options = {
        "batch_size": 4,
        "global_batch_size": 8,
        "epochs": 2,
        "checkpoint": SAVE,
        "resume": "auto",
        "log_every": 3,
    }
    whole = jobs.train("single", "words", run_dir=tmp_path / "whole", **options)
    places = [("tensor", 2), (other, size)]
    for before, after in (places, places[::-1]):
        run = {**options, "run_dir": tmp_path / f"from-{before[1]}-{before[0][:6]}"}
        saved = pool(before[1]).call(jobs.train, before[0], "words", stop_at=5, **run)[0]
        rest = pool(after[1]).call(jobs.train, after[0], "words", **run)[0]
        assert distance(rest["loaded"]["model"], saved["model"]) == 0
        assert distance(rest["loaded"]["optimizer"], saved["optimizer"]) == 0
        assert rest["progress"] == whole["progress"]
        assert distance(rest["model"], whole["model"]) < 1e-6
        assert rest["rows"][-1] == pytest.approx(whole["rows"][-1], rel=1e-5)


def test_a_checkpoint_holds_each_part_once_and_opens_anywhere(pool, tmp_path):
    first = pool(4).call(
        jobs.train, MIXED, "words", run_dir=tmp_path, checkpoint=True, batch_size=4, epochs=1
    )[0]
    snapshot = load_snapshot(first["checkpoint"])
    assert distance(snapshot.tensors["model"], first["model"]) == 0
    assert distance(TokenClassifier.load(first["checkpoint"]).state_dict(), first["model"]) == 0
    written = sum(p.stat().st_size for p in first["checkpoint"].rglob("*model*.safetensors"))
    assert (
        written < 1.5 * sum(t.numel() * t.element_size() for t in first["model"].values()) + 20_000
    )


@pytest.mark.parametrize(("strategy", "size"), [("tensor", 2), (MIXED, 4)])
def test_evaluation_and_prediction_count_every_sample_once(pool, strategy, size):
    alone = jobs.evaluate("single", "words", batch_size=4)
    expected = jobs.predict("single", "words", batch_size=4)
    for found in pool(size).call(jobs.evaluate, strategy, "words", batch_size=4):
        assert found["eval/loss"] == pytest.approx(alone["eval/loss"], rel=1e-6)
    for found in pool(size).call(jobs.predict, strategy, "words", batch_size=4):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("strategy", [("tensor-tiny", 2), ("tensor-tiny", 4)])
def test_metrics_are_those_of_one_process(pool, strategy):
    task = {"count": 33, "kind": "dataset"}
    alone = jobs.evaluate("single", "scored", task, batch_size=3)
    for found in pool(strategy[1]).call(jobs.evaluate, strategy[0], "scored", task, batch_size=3):
        assert found["eval/seen"] == 33
        for name, value in alone.items():
            if "runtime" not in name and "per_second" not in name:
                assert found[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_value_that_is_not_finite_on_one_rank_ends_all_before_the_update(pool, rank):
    ranks = pool(4).call(coordination_jobs.not_finite, rank, "loss", "raise", "fp32", "tensor-tiny")
    assert {changed for _, changed in ranks} == {False}
    assert len({told for told, _ in ranks}) == 1


@pytest.mark.parametrize(
    "case", ["missing", "style", "odd", "norm", "uneven", "fp16", "sharded", "auto", "tied"]
)
def test_what_cannot_be_split_is_refused_with_the_reason(pair, case):
    expected = {
        "missing": "no layer is called 'blocks.*.upp'. Did you mean 'blocks.",
        "style": "{'head': 'colwize'}): give one of colwise, rowwise",
        "odd": "head.weight has 5 rows, which 2 ranks cannot share evenly",
        "norm": "a LayerNorm has no weight matrix",
        "uneven": "2 ranks cannot be divided into tensor-parallel groups of 3",
        "fp16": "take precision='bf16'",
        "sharded": "leave sharded out",
        "auto": "no model in the task has a plan",
        "tied": "are one parameter, and the plan splits them in different ways",
    }
    for told in pair.call(tensor_parallel_jobs.refused, case):
        assert expected[case] in told


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": "full"},
        {"precision": "bf16"},
        {"on_nan": "skip"},
        {"clip_value": 0.01},
    ],
)
def test_other_options_work_on_split_layers(pair, options):
    first, second = pair.call(jobs.train, "tensor", "words", batch_size=4, steps=4, **options)
    alone = jobs.train("single", "words", batch_size=4, steps=4, **options)
    assert first["digest"] == second["digest"]
    assert distance(first["model"], alone["model"]) < (2e-2 if "precision" in options else 5e-7)


def test_a_task_made_in_configure_model_is_filled_from_rank_0(pair):
    first, second = pair.call(tensor_parallel_jobs.built_late)
    assert first == second
    assert first == tensor_parallel_jobs.built_late_alone()


def test_compiled_blocks_train_the_same(pair):
    options = {"batch_size": 4, "steps": 3, "eval_every": "never"}
    first, second = pair.call(fsdp_jobs.compiled, True, strategy="tensor", **options)
    alone = jobs.train("single", "words", **options)
    assert first["digest"] == second["digest"]
    assert distance(first["model"], alone["model"]) < 1e-5

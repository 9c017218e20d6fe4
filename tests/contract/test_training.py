"""Training over several ranks gives the numbers of one process, whatever the strategy."""

from __future__ import annotations

import pytest
import torch

from tests.contract import jobs, training_jobs
from tests.support import digest

# How far the weights of each strategy may be from those of one process, after 8 steps in fp32 with
# clipping. FSDP and DeepSpeed sum a norm from the parts of each tensor, which rounds otherwise than
# the norm of the whole tensor. DeepSpeed also steps elements of flat tensors, at whose ends the fused
# kernel rounds otherwise.
STRATEGIES = {"ddp": 0.0, "fsdp": 5e-7, "zero1": 5e-7, "zero2": 5e-7, "zero3": 5e-7}
CASES = [
    (s, t)
    for s in STRATEGIES
    for t in ("tiny", "words", "players")
    if t != "players" or not s.startswith("zero")
]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize(("strategy", "task"), CASES)
def test_two_ranks_end_with_the_weights_of_one_that_accumulates_twice(pair, strategy, task):
    options = {"batch_size": 8, "clip_norm": 0.5, "epochs": 2, "log_every": 3}
    first, second = pair.call(jobs.train, strategy, task, **options)
    alone = jobs.train("single", task, accumulate=2, **options)
    assert first["digest"] == second["digest"]
    assert first["left"] == second["left"]
    assert first["names"] == alone["names"]
    assert distance(first["model"], alone["model"]) <= STRATEGIES[strategy]
    assert distance(first["optimizer"], alone["optimizer"]) <= STRATEGIES[strategy]
    assert first["progress"] == second["progress"] == alone["progress"]
    if not STRATEGIES[strategy]:
        assert first["rows"] == second["rows"] == alone["rows"]


@pytest.mark.parametrize(("strategy", "task"), CASES)
def test_without_clipping_they_are_the_same_bits(pair, strategy, task):
    options = {"batch_size": 8, "epochs": 2, "log_every": 3}
    first, second = pair.call(jobs.train, strategy, task, **options)
    alone = jobs.train("single", task, accumulate=2, **options)
    assert first["digest"] == second["digest"]
    assert first["plain"] == alone["plain"]
    # The fused kernel rounds an element otherwise at the end of a tensor than within, and parts
    # have more ends. DeepSpeed has parts of all tensors in one, and divides by the weights of the
    # losses within its step.
    zero = strategy.startswith("zero")
    assert distance(first["model"], alone["model"]) <= (2e-7 if zero else 0)
    assert distance(first["optimizer"], alone["optimizer"]) <= (
        5e-8 if zero else 1e-10 if strategy == "fsdp" else 0
    )
    assert first["rows"] == second["rows"]
    for mine, theirs in zip(first["rows"], alone["rows"], strict=True):
        assert mine == (pytest.approx(theirs, rel=1e-6) if zero else theirs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulation_adds_up_before_it_is_averaged(pair, strategy):
    options = {"batch_size": 4, "epochs": 1, "clip_norm": 1.0}
    for task in ("tiny", "words"):
        first, _ = pair.call(jobs.train, strategy, task, accumulate=3, **options)
        alone = jobs.train("single", task, accumulate=6, **options)
        # The ranks sum in another order: (a + b + c) + (d + e + f).
        assert distance(first["model"], alone["model"]) < 1e-5
        assert first["progress"] == alone["progress"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_global_batch_size_gives_the_same_run_on_any_number_of_ranks(pool, size):
    options = {
        "batch_size": 4,
        "global_batch_size": 12 if size == 3 else 8,
        "epochs": 2,
        "precision": "fp64",
    }
    first = pool(size).call(jobs.train, "ddp", "words", **options)[0]
    alone = jobs.train("single", "words", **options)
    assert distance(first["model"], alone["model"]) < 1e-12
    assert first["progress"] == alone["progress"]
    for mine, theirs in zip(first["rows"], alone["rows"]):
        assert mine == pytest.approx(theirs, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", ["list", "stream", "workers"])
def test_iterables_are_shared_by_the_ranks_and_end_together(pair, kind):
    options = {"task_args": {"kind": kind}, "batch_size": 8, "epochs": 2, "steps": 100}
    first, second = pair.call(jobs.train, "ddp", "kinds", **options)
    alone = jobs.train("single", "kinds", accumulate=2, **options)
    assert first["digest"] == second["digest"] == alone["digest"]
    assert first["progress"] == second["progress"] == alone["progress"]


def test_data_that_ends_at_different_times_is_all_used_and_nobody_hangs(pair):
    # Rank 0 has 40 samples, rank 1 has 57: 5 batches and 8, the last of one sample.
    options = {
        "task_args": {"kind": "sharded", "count": 40},
        "batch_size": 8,
        "epochs": 2,
        "steps": 100,
        "eval_every": "never",
    }
    first, second = pair.call(jobs.train, "ddp", "kinds", **options)
    assert first["digest"] == second["digest"]
    assert first["progress"]["samples"] == second["progress"]["samples"] == 2 * (40 + 57)
    assert first["step"] == 2 * 8


MODES = [
    (s, m)
    for s in STRATEGIES
    for m in ("bf16", "fp16", "bf16-true", "fp64")
    if not s.startswith("zero") or "bf" in m
]


@pytest.mark.parametrize(("strategy", "mode"), MODES)
def test_it_trains_in_every_precision(pair, strategy, mode):
    first, second = pair.call(jobs.train, strategy, "tiny", precision=mode, batch_size=8, epochs=2)
    assert first["digest"] == second["digest"]
    assert first["rows"][-1]["eval/loss"] < 1.05


def test_torchs_own_streams_differ_between_ranks(pair):
    options = {"rng": "stream", "batch_size": 8, "epochs": 2, "task_args": {"dropout": 0.5}}
    first, second = pair.call(jobs.train, "ddp", "tiny", **options)
    assert first["digest"] == second["digest"]
    assert first["losses"] != second["losses"]


@pytest.mark.parametrize(
    "settings",
    [
        {"compress": "fp16"},
        {"compress": "bf16"},
        {"compress": "powersgd"},
        {"static_graph": True},
        {"bucket_cap_mb": 0.001},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"broadcast_buffers": False},
    ],
)
def test_every_knob_of_ddp_trains_the_same_task(pair, settings):
    options = {
        "batch_size": 4,
        "accumulate": 2,
        "epochs": 1,
        "clip_norm": 1.0,
        "eval_every": "never",
    }
    plain, _ = pair.call(jobs.train, "ddp", "words", **options)
    first, second = pair.call(jobs.train, ("DDP", settings), "words", **options)
    assert first["digest"] == second["digest"]
    limit = 5e-3 if settings.get("compress") in ("fp16", "bf16") else 1e-6
    assert distance(first["model"], plain["model"]) <= limit
    if limit > 1e-3:
        assert first["digest"] != plain["digest"], "nothing was compressed"


def test_parameters_that_are_trained_later_are_averaged_too(pair):
    first, second = pair.call(training_jobs.unfreeze)
    assert first["digest"] == second["digest"]
    assert first["moved"]


def test_a_parameter_that_the_loss_does_not_reach_is_explained(pair):
    for told in pair.call(training_jobs.unused):
        assert "DDP(find_unused_parameters=True)" in told


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_strategy_alone_serves_a_loop_written_by_hand(pair, strategy):
    first, second = pair.call(training_jobs.by_hand, strategy)
    assert first == second == training_jobs.by_hand("single")


@pytest.mark.parametrize(
    ("strategy", "task"), [("ddp", "tiny"), ("ddp", "words"), ("fsdp", "words")]
)
def test_a_prepared_loop_ends_with_the_bits_of_fit_run(pair, strategy, task):
    """On 60 samples in batches of 8 a rank ends with a short batch, and one with a dummy batch."""
    options = {"epochs": 2, "batch_size": 8, "accumulate": 2, "clip_norm": 0.5}
    first, second = pair.call(training_jobs.prepared_loop, task, strategy=strategy, **options)
    assert first["digest"] == second["digest"]
    assert first["digest"] == digest(pair.call(jobs.train, strategy, task, **options)[0]["model"])


def test_auto_is_one_process_here_and_ddp_among_several(pair):
    assert pair.call(training_jobs.strategy_of, "auto") == [("DDP", 2), ("DDP", 2)]
    assert training_jobs.strategy_of("auto") == ("SingleDevice", 1)


def test_a_number_of_devices_that_was_not_started_is_refused(pair):
    for told in pair.call(training_jobs.other_number):
        assert (
            told
            == "devices=3, and 2 processes were started on this machine: leave devices out, or start as many"
        )


@pytest.mark.parametrize("task", ["gan", "sam"])
def test_the_tasks_with_a_step_of_their_own_run_over_ranks(pair, task):
    first, second = pair.call(training_jobs.own_step, task, 2)
    alone = training_jobs.own_step(task, 1)
    assert first["digest"] == second["digest"]
    assert distance(first["model"], alone["model"]) < 1e-5


def test_a_value_logged_on_one_rank_at_the_end_of_an_epoch_is_a_row_on_all(pair):
    assert pair.call(training_jobs.rows_logged_on_one_rank) == [[0.0, 0.0]] * 2


def test_lbfgs_takes_the_steps_of_one_process(pair):
    (weights, losses), second = pair.call(training_jobs.lbfgs, "ddp")
    alone, alone_losses = training_jobs.lbfgs("single", accumulate=2)
    assert distance(weights, second[0]) == 0
    assert distance(weights, alone) < 1e-9
    assert losses == second[1] == pytest.approx(alone_losses, abs=1e-10)
    assert "shards them: take strategy='ddp'" in pair.call(training_jobs.lbfgs, "fsdp")[0]


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"on_nan": "skip"}])
@pytest.mark.parametrize(
    ("strategy", "kind"), [("ddp", "complex"), ("ddp", "sparse"), ("fsdp", "complex")]
)
def test_complex_and_sparse_gradients_are_those_of_one_process(pair, strategy, kind, options):
    first, second = pair.call(training_jobs.unusual, strategy, kind, **options)
    alone = training_jobs.unusual("single", kind, accumulate=2, **options)
    assert distance_of(first, second) == 0
    assert distance_of(first, alone) < 1e-6


def distance_of(one, other):
    """As ``distance``, with complex values."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_a_task_frees_learns_and_resumes_or_is_named(pair, strategy, tmp_path):
    alone = training_jobs.freed("single", True, accumulate=2)
    first, second = pair.call(training_jobs.freed, strategy, True)
    assert distance(first, second) == 0
    assert distance(first, alone) < 1e-6
    options = {"run_dir": str(tmp_path), "resume": "auto", "checkpoint": True}
    resumed, _ = pair.call(training_jobs.freed, strategy, True, [3], **options)
    assert distance(resumed, first) == 0
    for said in pair.call(training_jobs.freed, strategy, False):
        assert "net.0." in said
        assert "has a gradient and is in no parameter group" in said

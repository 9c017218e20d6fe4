"""Steps that use other parameters on each rank train right or are refused; shared ones are sharded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.contract import use_jobs
from tests.contract.test_training import distance

WHOLE = ("FSDP", {"wrap": 10**9})
UNUSED = ("DDP", {"find_unused_parameters": True})


@pytest.mark.parametrize(
    "uses", ["heads", "modality", "skipped layers", "not in the loss", "scalars"]
)
@pytest.mark.parametrize("strategy", [UNUSED, WHOLE], ids=["ddp", "fsdp whole"])
def test_parameters_of_one_group_may_be_used_on_some_ranks_alone(pair, strategy, uses):
    for options in ({}, {"accumulate": 2, "clip_norm": 0.5}, {"on_nan": "ignore"}):
        first, second = pair.call(use_jobs.parts, strategy, uses, **options)
        alone = use_jobs.parts(
            "single", uses, **{**options, "accumulate": 2 * options.get("accumulate", 1)}
        )
        assert distance(first, second) == 0
        assert distance(first, alone) < 1e-6


@pytest.mark.parametrize(
    ("uses", "named"),
    [
        (
            "heads",
            "rank 0 continues with heads.0.weight, heads.0.bias, and rank 1 with heads.1.weight",
        ),
        ("modality", "and rank 1 with heads.1.weight, heads.1.bias"),
        (
            "skipped layers",
            "rank 0 continues with layers.0.weight, layers.0.bias, and rank 1 with layers.1",
        ),
        ("order", "layers.2.weight"),
        ("not in the loss", "heads.1.weight"),
    ],
)
def test_parameters_that_ranks_gather_in_another_order_are_named_before_an_update(
    pair, uses, named
):
    first, second = pair.call(use_jobs.parts, "fsdp", uses)
    assert first == second
    assert first.startswith("TaskError: a step uses other parameters on each rank")
    assert named in first
    assert "DDP(find_unused_parameters=True)" in first
    assert first.endswith("[untrained]")


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("uses", "shapes"), [("heads", (2, 2)), ("modality", (2, 6)), ("skipped layers", (2, 2))]
)
def test_deepspeed_names_what_ranks_use_in_another_order(pair, strategy, uses, shapes):
    first, second = pair.call(use_jobs.deepspeed_parts, strategy, uses, shapes)
    assert first == second
    assert first.startswith("TaskError: a step uses other parameters on each rank")
    assert ("layers.0" if uses == "skipped layers" else "heads.1") in first


@pytest.mark.parametrize("strategy", ["fsdp", WHOLE, UNUSED])
def test_what_changes_on_all_ranks_alike_is_trained(pair, strategy):
    first, second = pair.call(use_jobs.parts, strategy, "same on all")
    assert distance(first, second) == 0
    assert distance(first, use_jobs.parts("single", "same on all", accumulate=2)) < 1e-6


def test_ddp_names_what_the_loss_did_not_reach_before_the_update(pair):
    first, second = pair.call(use_jobs.parts, "ddp", "later")
    assert first == second
    assert "the loss did not reach idle.weight, idle.bias:" in first
    assert "find_unused_parameters=True" in first
    assert first.endswith("[untrained]")


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_rank_that_leaves_the_order_later_ends_all_with_the_names(
    rank_programs, tmp_path, strategy
):
    script = tmp_path / "train.py"
    script.write_text(
        "from tests.contract import jobs, use_jobs\n"
        "from loopkit import Fit\n"
        "from loopkit.strategies import collective_order\n"
        "collective_order._PATIENCE = 1.0  # the others stay: there is nothing to wait for\n"
        f"Fit(strategy=jobs.make({strategy!r}), devices=2, accelerator='cpu', epochs=2, progress=False,\n"
        "    loggers=None, checkpoint=False).run(use_jobs.Parts('later', scalars=False))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = rank_programs.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "loopkit.errors.TaskError: a step uses other parameters on each rank: rank 1"
    )
    assert "layers.2.weight" in last


@pytest.mark.parametrize("share", ["", "weight", "module", "block", "embedding", "nested"])
@pytest.mark.parametrize("wrap", ["auto", 10, ["Block"], ["Block", "Linear", "Embedding"]], ids=str)
def test_what_modules_share_is_sharded_right_under_every_wrap(pair, share, wrap):
    (first, gathered), (second, _) = pair.call(use_jobs.sharing, ("FSDP", {"wrap": wrap}), share)
    alone, _ = use_jobs.sharing("single", share, accumulate=2)
    assert distance(first, second) == 0
    assert distance(first, alone) < 1e-5
    if not share:
        assert gathered > 3, "blocks that share nothing stay gathered by themselves"

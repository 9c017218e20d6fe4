"""DeepSpeed: what it refuses, its configuration, non-finite steps, and its checkpoints."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from loopkit import Checkpoint, DeepSpeed, Fit
from loopkit.checkpoint.tools import export_model
from loopkit.errors import MissingExtraError, OptionError
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.deepspeed.config import ZeroSettings, resolve
from loopkit.strategies.deepspeed.engine import import_deepspeed
from loopkit.strategies.precision import PRECISIONS
from tests.contract import coordination_jobs, deepspeed_jobs, jobs
from tests.contract.tasks import TokenClassifier
from tests.contract.test_training import distance

ZERO = ["zero1", "zero2", "zero3"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"stage": 0}, "strategy='ddp'"),
        ({"stage": 4}, "give 1"),
        ({"stage": True}, "give 1"),
        ({"stage": 1, "config": {"zero_optimization": {"stage": 2}}}, "differ"),
        ({"config": {"zero_optimization": {"stage": 0}}}, "strategy='ddp'"),
        ({"stage": 2, "offload_parameters": True}, "stage 3 alone"),
        ({"config": "no/such.json"}, "cannot be read"),
        ({"config": 3}, "give a dict"),
        ({"timeout": 0}, "seconds above 0"),
    ],
)
def test_arguments_are_checked_at_once(arguments, told):
    with pytest.raises(OptionError, match=told):
        DeepSpeed(**arguments)


def settings(**more) -> ComputeSettings:
    return ComputeSettings(**{"batch_size": 8, "accumulate": 2, "clip_norm": 0.5, **more})


def test_auto_and_what_is_left_out_take_the_values_of_fit():
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
    }
    for given in (auto, {}):
        whole = resolve(given, ZeroSettings(), settings(), 3, pin=False)
        assert (whole["train_batch_size"], whole["train_micro_batch_size_per_gpu"]) == (48, 8)
        assert (whole["gradient_accumulation_steps"], whole["gradient_clipping"]) == (2, 0.5)
        assert whole["zero_optimization"] == {"stage": 2}
        assert not whole["bf16"]["enabled"]
        assert not whole["fp16"]["enabled"]
    assert (
        resolve({}, ZeroSettings(), settings(clip_norm=None), 1, pin=False)["gradient_clipping"]
        == 0.0
    )
    assert (
        resolve({}, ZeroSettings(), settings(accumulate=1, global_batch_size=64), 2, pin=False)[
            "gradient_accumulation_steps"
        ]
        == 4
    )
    assert resolve({}, ZeroSettings(3, True, True), settings(), 1, pin=True)[
        "zero_optimization"
    ] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
    }
    true = resolve({}, ZeroSettings(), settings(precision=PRECISIONS["bf16-true"]), 1, pin=False)
    assert true["bf16"]["enabled"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, ["=4", "8", "Fit(batch_size=8"]),
        ({"gradient_accumulation_steps": 3}, ["=3", "accumulate=2"]),
        ({"train_batch_size": 16}, ["=16", "32"]),
        ({"gradient_clipping": 1.0}, ["=1.0", "clip_norm=0.5"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=True", "precision='fp32'", "'bf16-true'"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled=True", "precision='fp32'"]),
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'", "Task.optimizers()"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "schedule="]),
        ({"amp": {}}, ["'amp'", "precision"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ["nvme", "'cpu'"],
        ),
        ({"zero_optimization": {"zenflow": {}}}, ["zenflow"]),
    ],
)
def test_a_contradiction_names_both_sides(config, told):
    with pytest.raises(OptionError) as caught:
        resolve(config, ZeroSettings(), settings(), 2, pin=False)
    assert all(words in str(caught.value) for words in told), caught.value


def test_the_engine_that_begins_with_a_step_of_its_own_is_refused():
    config = {"data_types": {"grad_accum_dtype": "fp32"}}
    true = settings(precision=PRECISIONS["bf16-true"])
    with pytest.raises(OptionError, match="stage=2"):
        resolve(config, ZeroSettings(1), true, 1, pin=False)
    assert resolve(config, ZeroSettings(2), true, 1, pin=False)["data_types"]


def test_what_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loopkit-torch\[deepspeed\]'"):
        import_deepspeed(torch.device("cpu"))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("fp64", "single precision"),
        ("fp16-true", "single precision"),
        ("clip_value", "clip_norm="),
        ("compile", "stage=2"),
        ("several", "left, right"),
        ("task", "Watching listens to on_before_update"),
        ("GradMonitor", "GradMonitor listens"),
        ("EMA", "flat parts"),
        ("SWA", "flat parts"),
        ("Unfreeze", "flat parts"),
        ("FindLR", "strategy='ddp'"),
        ("adafactor", "Adafactor needs each parameter whole"),
        ("adagrad", "Adagrad needs"),
        ("contradiction", "clip_norm=None"),
        ("scalar", "scale has no dimension"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_before_training(pair, what, told):
    for kind, message in pair.call(deepspeed_jobs.refused, what):
        assert kind == "OptionError"
        assert told in message


def test_a_configuration_file_with_auto_trains_the_same_task(pair, tmp_path):
    # As files written for other trainers have it. One process writes it: each rank reads it.
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": "auto",
            "allgather_bucket_size": 1000,
            "overlap_comm": False,
        },
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    options = {
        "batch_size": 4,
        "accumulate": 2,
        "epochs": 1,
        "clip_norm": 0.5,
        "eval_every": "never",
    }
    first, second = pair.call(deepspeed_jobs.by_file, path, **options)
    assert first["digest"] == second["digest"]
    plain, _ = pair.call(jobs.train, "ddp", "words", **options)
    assert distance(first["model"], plain["model"]) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": 2, "offload_optimizer": True},
        {"stage": 3, "offload_optimizer": True},
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
        {"stage": 3},
        {"stage": 1, "config": {"zero_optimization": {"reduce_bucket_size": 100}}},
        {"stage": 3, "config": {"zero_optimization": {"sub_group_size": 300}}},
    ],
)
def test_every_knob_trains_the_same_task(pair, settings):
    options = {"batch_size": 4, "accumulate": 2, "epochs": 1, "eval_every": "4 steps"}
    plain, _ = pair.call(jobs.train, "ddp", "words", **options)
    first, second = pair.call(jobs.train, ("DeepSpeed", settings), "words", **options)
    assert first["digest"] == second["digest"]
    assert distance(first["model"], plain["model"]) < 1e-6
    assert distance(first["optimizer"], plain["optimizer"]) < 1e-6


@pytest.mark.parametrize("strategy", ZERO)
def test_each_rank_holds_its_part_of_what_its_stage_shards(pair, strategy):
    for told in pair.call(deepspeed_jobs.held, strategy):
        assert told["state"] < 0.6 * 2 * told["whole"]
        assert told["parameters"] == (0 if strategy == "zero3" else told["whole"])


@pytest.mark.parametrize("how", ["loss", "gradient", "infinite"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_a_value_that_is_not_finite_on_one_rank_ends_all_before_the_update(pair, strategy, how):
    (told, changed), other = pair.call(
        coordination_jobs.not_finite, 1, how, "raise", "fp32", strategy
    )
    assert other == (told, changed)
    assert "step 3" in told
    assert "on rank 1" in told or how == "gradient"
    assert not changed


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
@pytest.mark.parametrize("strategy", ZERO)
def test_a_step_that_is_left_out_is_left_out_on_all_ranks(pair, strategy, precision):
    (skipped, digest), other = pair.call(
        coordination_jobs.not_finite, 0, "infinite", "skip", precision, strategy
    )
    assert other == (skipped, digest)
    assert skipped == 1


def test_a_task_that_a_failed_run_left_partitioned_is_refused(pair):
    for told in pair.call(deepspeed_jobs.left_partitioned):
        assert "a run that failed has left this task's parameters partitioned" in told


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
@pytest.mark.parametrize("strategy", ZERO)
def test_a_checkpoint_is_one_of_ours_and_opens_without_deepspeed(
    pair, tmp_path, strategy, precision
):
    options = {
        "batch_size": 4,
        "epochs": 1,
        "precision": precision,
        "checkpoint": Checkpoint(every="3 steps"),
        "run_dir": tmp_path,
    }
    first, _ = pair.call(jobs.train, strategy, "words", **options)
    assert {path.suffix for path in first["checkpoint"].rglob("*.*")} <= {".safetensors", ".json"}
    export_model(first["checkpoint"], tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert distance(saved, first["model"]) == 0
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert distance(TokenClassifier.load(first["checkpoint"]).state_dict(), first["model"]) == 0
    found = Fit(progress=False, batch_size=4, precision=precision).evaluate(
        TokenClassifier(), checkpoint=tmp_path
    )
    assert found["eval/loss"] == pytest.approx(
        first["rows"][-1]["eval/loss"], rel=1e-6 if precision == "fp32" else 1e-2
    )


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_an_evaluation_of_a_checkpoint_sees_its_weights(pair, tmp_path, strategy):
    save = Checkpoint(
        every="2 steps", keep=None, best="eval/loss:max", load_best=True, background=False
    )
    options = {
        "batch_size": 4,
        "epochs": 1,
        "eval_every": "2 steps",
        "checkpoint": save,
        "run_dir": tmp_path,
    }
    first, second = pair.call(jobs.train, strategy, "words", **options)
    assert first["best"]["step"] < first["step"]
    for told in pair.call(deepspeed_jobs.evaluate, strategy, first["best"]["checkpoint"]):
        assert told == first["best"]["value"]
    assert (
        first["left"]
        == second["left"]
        == jobs.digest(TokenClassifier.load(first["best"]["checkpoint"]).state_dict())
    )


@pytest.mark.parametrize("strategy", ZERO)
def test_frozen_parameters_scalars_and_buffers_are_kept_and_resumed(pair, tmp_path, strategy):
    options = {
        "batch_size": 4,
        "epochs": 1,
        "resume": "auto",
        "checkpoint": Checkpoint(every="never"),
        "clip_norm": 0.5,
        "task_args": {"shape": (1,) if strategy == "zero3" else ()},
    }
    whole, other = pair.call(
        jobs.train, strategy, "part frozen", run_dir=tmp_path / "whole", **options
    )
    assert whole["digest"] == other["digest"]
    plain, _ = pair.call(jobs.train, "ddp", "part frozen", run_dir=tmp_path / "ddp", **options)
    assert distance(whole["model"], plain["model"]) < 1e-6
    assert torch.equal(whole["model"]["embed.weight"], TokenClassifier().embed.weight)
    pair.call(jobs.train, strategy, "part frozen", run_dir=tmp_path / "run", stop_at=3, **options)
    assert (
        pair.call(jobs.train, strategy, "part frozen", run_dir=tmp_path / "run", **options)[0][
            "digest"
        ]
        == whole["digest"]
    )


def test_a_model_made_in_configure_model_is_partitioned_at_once(pair):
    first, second = pair.call(deepspeed_jobs.built_late, "zero3")
    alone = deepspeed_jobs.built_late("single")
    for told in (first, second):
        assert told["partitioned"]
        assert told["held"] == 0
        assert told["tied"]
        assert not told["left"]
        assert distance(told["weights"], alone["weights"]) < 1e-6


@pytest.mark.parametrize("strategy", ZERO)
def test_afterwards_the_task_is_an_ordinary_module(pair, strategy):
    first, second = pair.call(deepspeed_jobs.afterwards, strategy)
    assert first == second
    assert first["told"] == first["again"]
    assert not first["left"]
    assert first["grads"]
    assert first["more"] < first["told"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_fp16_deepspeeds_scaler_is_saved_and_resumed(pair, tmp_path, stage):
    for told in pair.call(deepspeed_jobs.fp16, stage, tmp_path):
        assert told["same"]
        assert told["loss"] < 1.05
        assert "'weight'" in told["weighted"]


def test_activation_checkpointing_and_compile_change_nothing(pair):
    plain, _ = pair.call(deepspeed_jobs.equipped, False)
    first, _ = pair.call(deepspeed_jobs.equipped, True)
    assert distance(first["model"], plain["model"]) < 1e-5


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_dry_run_leaves_the_weights_as_they_were(pair, strategy):
    assert pair.call(deepspeed_jobs.dry_run, strategy) == [True, True]

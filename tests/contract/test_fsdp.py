"""FSDP: what is sharded, how it is built, saved and loaded, and what it does to memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loopkit import Checkpoint, Fit
from loopkit.checkpoint import load_snapshot
from tests.contract import fsdp_jobs, jobs
from tests.contract.tasks import TokenClassifier
from tests.contract.test_training import distance


@pytest.mark.parametrize(
    "settings",
    [
        {"reshard_after_forward": False},
        {"wrap": 200},
        {"wrap": ["Block"]},
        {"prefetch": 1},
        {"offload": True},
        {"reduce_dtype": torch.float32},
        {"param_dtype": torch.bfloat16},
    ],
)
def test_every_knob_trains_the_same_task(pair, settings):
    options = {"batch_size": 4, "accumulate": 2, "epochs": 1, "eval_every": "4 steps"}
    plain, _ = pair.call(jobs.train, "fsdp", "words", **options)
    first, second = pair.call(jobs.train, ("FSDP", settings), "words", **options)
    assert first["digest"] == second["digest"]
    if "param_dtype" in settings:
        assert 0 < distance(first["model"], plain["model"]) < 0.05
    else:
        assert distance(first["model"], plain["model"]) == 0


def test_hybrid_sharding_over_four_ranks_is_data_parallel_over_four(pool):
    options = {"batch_size": 4, "epochs": 2, "clip_norm": 0.5}
    hybrid = pool(4).call(jobs.train, ("FSDP", {"replicas": 2}), "words", **options)
    plain = pool(4).call(jobs.train, "ddp", "words", **options)
    assert len({each["digest"] for each in hybrid}) == 1
    assert distance(hybrid[0]["model"], plain[0]["model"]) < 1e-6


def test_each_rank_holds_its_part_of_everything_that_is_large(pair):
    for told in pair.call(fsdp_jobs.sizes):
        assert told["parameters"] < 0.6 * told["whole"]
        assert told["state"] < 0.6 * 2 * told["whole"]
        assert told["class"] == "TokenClassifier"
        assert told["after evaluation"] == told["parameters"]


def test_a_model_made_in_configure_model_is_made_once_and_has_the_same_weights(pair):
    first, second = pair.call(fsdp_jobs.built_late)
    assert first["made on"] == ["cpu"]
    assert second["made on"] == ["meta"]
    assert first["digest"] == second["digest"] == fsdp_jobs.built_late("single")["digest"]
    assert first["tied"]
    assert second["tied"]


def test_scalars_and_buffers_are_kept_whole_and_alike(pair):
    first, second = pair.call(fsdp_jobs.scalars, "fsdp")
    alone = fsdp_jobs.scalars("single")
    assert distance(first, second) == 0
    assert first.keys() == alone.keys()
    assert distance(first, alone) < 1e-6


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_has_a_file_for_each_rank_and_opens_anywhere(pair, tmp_path, background):
    save = Checkpoint(every="3 steps", background=background)
    first, _ = pair.call(
        jobs.train, "fsdp", "words", batch_size=4, epochs=1, checkpoint=save, run_dir=tmp_path
    )
    files = sorted(
        str(p.relative_to(first["checkpoint"])) for p in first["checkpoint"].rglob("*.safetensors")
    )
    assert {
        "shards/model-00000.safetensors",
        "shards/model-00001.safetensors",
        "shards/optimizer-00001.safetensors",
    } <= set(files)
    manifest = json.loads((first["checkpoint"] / "MANIFEST.json").read_text())
    assert manifest["strategy"] == "FSDP"
    snapshot = load_snapshot(first["checkpoint"])
    assert distance(snapshot.tensors["model"], first["model"]) == 0
    assert distance(TokenClassifier.load(first["checkpoint"]).state_dict(), first["model"]) == 0
    out = tmp_path / "out"
    from loopkit.checkpoint.tools import export_model

    export_model(first["checkpoint"], out)
    assert distance(load_file(out / "model.safetensors"), first["model"]) == 0
    assert (
        Fit(progress=False, batch_size=4).evaluate(TokenClassifier(), checkpoint=tmp_path)[
            "eval/loss"
        ]
        == first["rows"][-1]["eval/loss"]
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("background", [True, False])
def test_a_rank_that_cannot_write_its_part_ends_all_alike_and_the_last_valid_checkpoint_stays(
    pair, tmp_path, rank, background
):
    first, second = pair.call(fsdp_jobs.disk_full, tmp_path, rank, background)
    assert first == second
    assert "DiskFullError" in first[0]
    assert first[1] == ["latest", "step-000000000002"]


@pytest.mark.parametrize("hook", ["EMA", "GradMonitor", "SWA", "LRMonitor", "Throughput"])
def test_hooks_work_on_sharded_parameters(pair, tmp_path, hook):
    first, second = pair.call(fsdp_jobs.with_hook, hook, "fsdp", tmp_path / "fsdp")
    alone = fsdp_jobs.with_hook(hook, "single", tmp_path / "single")
    assert first == second
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        if "second" not in name and "runtime" not in name:
            assert first[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_block_that_is_not_there_is_named(pair):
    for told in pair.call(fsdp_jobs.bad_wrap):
        assert "no module is of class 'Blok'; there are Block, " in told


@pytest.mark.parametrize("activation_checkpointing", ["full", None])
@pytest.mark.parametrize("compile", [True, False])
def test_activation_checkpointing_and_compile_change_nothing(
    pair, activation_checkpointing, compile
):
    options = {
        "batch_size": 4,
        "epochs": 1,
        "activation_checkpointing": activation_checkpointing,
        "eval_every": "never",
        "steps": 3,
    }
    plain, _ = pair.call(
        jobs.train, "fsdp", "words", **{**options, "activation_checkpointing": None}
    )
    first, _ = pair.call(fsdp_jobs.compiled, compile, **options)
    assert distance(first["model"], plain["model"]) < 1e-5


def test_a_dry_run_leaves_the_weights_as_they_were(pair):
    assert pair.call(fsdp_jobs.dry_run) == [True, True]


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's account of memory"
)
def test_a_rank_reads_only_its_parts_of_a_checkpoint(pair, tmp_path):
    pair.call(fsdp_jobs.train_wide, tmp_path / "run")
    found = {}
    for maps in (True, False):
        shutil.copytree(tmp_path / "run", tmp_path / str(maps))
        found[maps] = pair.call(fsdp_jobs.memory_to_resume, tmp_path / str(maps), maps)
    whole = 3 * 2 * 2000 * 2000 * 4
    for (mapped, weights), (read, same) in zip(found[True], found[False]):
        assert weights == same
        assert read > whole
        assert mapped < read - whole / 2


def test_the_fused_kernel_on_parts_gives_the_bits_of_torchs_own_step(pair):
    own, of_torch = (pair.call(fsdp_jobs.stepped, hooked) for hooked in (False, True))
    assert [digest for digest, _ in own] == [digest for digest, _ in of_torch]
    assert [calls for _, calls in own] == [1, 1], "only the first step, which makes the state"
    assert [calls for _, calls in of_torch] == [6, 6]


@pytest.mark.parametrize("strategy", ["fsdp", "tensor"])
@pytest.mark.parametrize(
    "name", ["sgd", "adagrad", "rmsprop", "nadam", "radam", "lion", "muon", "adamw_bf16"]
)
def test_optimizers_step_sharded_parameters(pair, name, strategy):
    first, second = pair.call(fsdp_jobs.optimized, name, strategy)
    alone = fsdp_jobs.optimized(name, "single", accumulate=2 if strategy == "fsdp" else 1)
    assert first["digest"] == second["digest"]
    # Muon multiplies matrices in bfloat16; a bf16 moment rounds what differs in its last bit;
    # RMSprop divides by it.
    assert distance(first["model"], alone["model"]) < {
        "muon": 1e-2,
        "adamw_bf16": 2e-4,
        "rmsprop": 2e-5,
    }.get(name, 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_several_optimizers_train_under_autocast(pair, precision):
    options = {"batch_size": 8, "epochs": 1, "precision": precision}
    first, second = pair.call(jobs.train, "fsdp", "players", **options)
    plain, _ = pair.call(jobs.train, "ddp", "players", **options)
    assert first["digest"] == second["digest"]
    # AdamW's first steps are of its rate, 1e-2, whatever the size of a rounding.
    assert distance(first["model"], plain["model"]) < 2e-2


@pytest.mark.parametrize("strategy", ["fsdp", "tensor"])
@pytest.mark.parametrize("name", ["adafactor", "adamw_8bit"])
def test_an_optimizer_that_needs_whole_parameters_is_refused(pair, name, strategy):
    for told in pair.call(fsdp_jobs.refused_optimizer, name, strategy):
        assert "needs each parameter whole" in told
        assert "OptionError" in told


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's account of a process"
)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", ("FSDP", {"replicas": 2})], ids=str)
def test_fits_one_after_another_leave_no_thread_and_no_file(pool, tmp_path, strategy):
    for after in pool(4).call(fsdp_jobs.many_fits, strategy, 5, tmp_path):
        # The first ones start what stays for the process.
        files, threads = zip(*after[2:])
        assert len(set(files)) == 1
        assert len(set(threads)) == 1

"""Checkpoint(save_on_each_node=True): machines that share no disk resume to the same bits, whoever is rank 0."""

from __future__ import annotations

import shutil

import pytest

from loopkit.checkpoint import Store, load_snapshot, scan
from loopkit.errors import OptionError
from tests.contract.node_disks_jobs import train
from tests.support import quiet


@pytest.fixture
def disks(tmp_path) -> list[str]:
    return [str(tmp_path / "disk-0"), str(tmp_path / "disk-1")]


def checkpoints(disk: str) -> list[str]:
    return [entry.path.name for entry in scan(Store(partial=True), f"{disk}/runs/a")]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resume_finds_who_has_what(pair, disks, tmp_path, strategy):
    whole = pair.call(train, [str(tmp_path / "w0"), str(tmp_path / "w1")], strategy)[0]["weights"]
    stopped = pair.call(train, disks, strategy, fail_at=10)
    assert [each["error"] for each in stopped] == ["out", "out"]
    first, second = (checkpoints(disk) for disk in disks)
    assert first == second == ["step-000000000004", "step-000000000008"]
    # The other machine is rank 0 now, and its newest checkpoint lacks a byte.
    newest = tmp_path / "disk-1/runs/a/checkpoints" / second[-1]
    path = [*newest.glob("optimizer*.safetensors"), *newest.glob("shards/model-*")][-1]
    path.write_bytes(path.read_bytes()[:-1])
    resumed = pair.call(train, disks[::-1], strategy)
    if strategy == "ddp":
        assert [each["began"] for each in resumed] == [[8], [8]], (
            "the damaged file came from the other"
        )
    else:
        assert [each["began"] for each in resumed] == [[4], [4]], "nobody else has that shard"
    assert [each["weights"] for each in resumed] == [whole] * 2
    assert checkpoints(disks[0]) == checkpoints(disks[1])


def test_a_new_machine_gets_all_and_a_lost_shard_is_named(pair, disks, tmp_path):
    whole = pair.call(train, disks, "fsdp", steps=8)[0]["weights"]
    one = tmp_path / "disk-0/runs/a"
    shutil.rmtree(disks[1])
    lost = pair.call(train, disks, "fsdp")
    assert all("shards/model-00001.safetensors is nowhere valid" in each["error"] for each in lost)
    assert all(each["began"] == [] for each in lost), "it does not start from zero"
    # Under DDP each machine has all.
    shutil.rmtree(one)
    assert pair.call(train, disks, "ddp", steps=8)[0]["weights"] == whole
    shutil.rmtree(disks[1])
    resumed = pair.call(train, disks[::-1], "ddp", steps=8)
    assert [each["error"] for each in resumed] == ["", ""]
    assert [each["weights"] for each in resumed] == [whole] * 2
    for disk in disks:
        load_snapshot(tmp_path / disk / "runs/a")  # complete, and verified


def test_retention_frees_every_disk(pair, disks):
    pair.call(train, disks, "fsdp", keep=2)
    assert [checkpoints(disk) for disk in disks] == [["step-000000000012", "step-000000000014"]] * 2


def test_one_disk_after_all_is_refused_before_the_first_step(pair, disks):
    refused = pair.call(train, [disks[0]] * 2, "ddp")
    assert all("the machines of ranks 0, 1 share" in each["error"] for each in refused)
    assert all(each["began"] == [] for each in refused)


def test_the_option_needs_a_directory():
    from loopkit import Checkpoint

    with pytest.raises(OptionError, match="needs run_dir="):
        quiet(checkpoint=Checkpoint(save_on_each_node=True))

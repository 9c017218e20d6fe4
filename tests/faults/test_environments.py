"""What launchers other than torchrun write: Kubernetes, machines started by hand; and what a cut network says."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import yaml

from loopkit.distributed import environment
from loopkit.distributed.environment import find_node_info, find_rank_info
from loopkit.distributed.heartbeat import Heartbeat
from loopkit.errors import OptionError
from loopkit.fit.strategy_setup import start_ranks
from loopkit.options import Options

POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"


def test_a_pod_of_a_pytorchjob_has_devices_of_its_own():
    env = {
        **POD,
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "points-master-0",
        "MASTER_PORT": "23456",
    }
    info = find_rank_info(env)
    assert (info.rank, info.size, info.local_rank, info.local_size, info.nodes) == (1, 2, 0, 1, 2)
    assert (info.host, info.port, info.hosted) == ("points-master-0", 23456, False)
    with pytest.raises(OptionError, match="torchrun"):
        find_rank_info({**env, "PET_NPROC_PER_NODE": "8"})
    # torchrun in a pod writes all of its own.
    of_torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_rank_info({**env, "PET_NPROC_PER_NODE": "2", **of_torchrun}).local_rank == 1


def test_a_pod_of_a_trainjob_is_a_machine_started_by_hand(monkeypatch):
    env = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "points-node-0-0.points",
           "PET_MASTER_PORT": "29400", "PET_NPROC_PER_NODE": "auto", **POD}  # fmt: skip
    assert find_rank_info(env) is None
    node = find_node_info(2, env)
    assert (node.node_rank, node.host, node.port, node.nodes) == (
        1,
        "points-node-0-0.points",
        29400,
        2,
    )
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=r"started on 2 machines .* torchrun, or pass nodes=2"):
        start_ranks(Options(strategy="ddp", accelerator="cpu"))


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "nodes=2: start the script on each machine, with torchrun --nnodes 2"),
        ({"NODE_RANK": "1", "MASTER_ADDR": "node0"}, "MASTER_PORT"),
        (
            {"NODE_RANK": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1"},
            "NODE_RANK=2, and nodes=2",
        ),
    ],
)
def test_machines_started_by_hand_need_all_variables(env, said):
    with pytest.raises(OptionError, match=re.escape(said)):
        find_node_info(2, env)


def test_the_manifests_of_the_docs_are_kubernetes_objects():
    texts = re.findall(r"```yaml title=\"\w+\.yaml\"\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    train_job, pytorch_job = map(yaml.safe_load, texts)
    assert train_job["kind"] == "TrainJob"
    assert train_job["spec"]["trainer"]["command"] == ["torchrun", "train.py"]
    replicas = pytorch_job["spec"]["pytorchReplicaSpecs"]
    for pod in replicas.values():
        (container,) = pod["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the name that the operator looks for"
        assert container["command"] == ["python", "train.py"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_who_cannot_be_reached_is_said_by_each_side(monkeypatch):
    monkeypatch.setattr(Heartbeat, "_send", lambda self: None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        info = environment.RankInfo(1, 2, 0, 1, "127.0.0.1", port, nodes=2)
        said, cut_off = Heartbeat(info).diagnose()
    assert f"cannot reach 127.0.0.1:{port}, where the ranks meet" in said
    assert "the process there that held it has ended" in said
    assert cut_off
    here = Heartbeat(info)
    report = {
        "number": 4,
        "pid": 1,
        "identity": None,
        "machine": "node1 (10.0.0.2)",
        "at": "train.py:9 in step",
    }
    text = here._describe_dead([0], {0: report}, "node0 (10.0.0.1)")
    assert text.startswith(
        "rank 0 cannot be reached from rank 1, on node0 (10.0.0.1): no heartbeat"
    )
    assert text.endswith("rank 0 was last on node1 (10.0.0.2) at train.py:9 in step")
    same = here._describe_dead(
        [0], {0: {**report, "machine": "node0 (10.0.0.1)"}}, "node0 (10.0.0.1)"
    )
    assert same.startswith("rank 0 stopped: no heartbeat")


def test_machines_that_count_restarts_apart_meet_in_a_new_store():
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "1"}
    both = [{**env, "TORCHELASTIC_RESTART_COUNT": count} for count in ("0", "2")]
    assert {find_rank_info(each).attempt for each in both} == {"0"}
    shared = {**both[1], "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert find_rank_info(shared).attempt == "2", "a store that outlives an attempt"

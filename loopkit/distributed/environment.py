"""This process's rank, as the launcher that started it wrote it into the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from loopkit.errors import OptionError


@dataclass(frozen=True)
class RankInfo:
    """The rank of a process, and where the processes that were started together meet.

    Attributes:
        rank, size: this process's rank, and the number of processes.
        local_rank, local_size: the same on this machine.
        host, port: the address of the store where the processes meet.
        attempt: which start this is: the job and step where there are such, and how often the
            launcher has restarted the processes. Keys of another start are not read.
        nodes: the number of machines; None if that is not known.
        hosted: whether the launcher holds the store; if not, rank 0 holds it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    attempt: str = "0"
    hosted: bool = False
    nodes: int | None = None


@dataclass(frozen=True)
class NodeInfo:
    """One of several machines on which the same script is started by hand.

    Attributes:
        node_rank: the number of this machine; machine 0 holds the store where the ranks meet.
        host, port: the address of machine 0, and a free port there.
        nodes: the number of machines.
    """

    node_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    nodes: int = 1


ONE_MACHINE = NodeInfo()


def find_node_info(nodes: int, env: Mapping[str, str] = os.environ) -> NodeInfo:
    """Return which of ``nodes`` machines this is, by NODE_RANK, MASTER_ADDR and MASTER_PORT.

    Kubeflow's trainer writes PET_NODE_RANK and so on, as torchrun reads them.

    Raises:
        OptionError: one of the variables is missing, or NODE_RANK is not below ``nodes``.
    """
    names = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: env[f"PET_{name}"] for name in names if f"PET_{name}" in env} | dict(env)
    try:
        rank, port = int(given["NODE_RANK"]), int(given["MASTER_PORT"])
        host = given["MASTER_ADDR"]
    except (KeyError, ValueError):
        raise OptionError(
            f"nodes={nodes}: start the script on each machine, with torchrun --nnodes {nodes} (or "
            "srun), or with NODE_RANK=0 (1, ...), MASTER_ADDR=<machine 0> and MASTER_PORT=<a free "
            "port there> in the environment"
        ) from None
    if not 0 <= rank < nodes:
        raise OptionError(f"NODE_RANK={rank}, and nodes={nodes}: give 0 to {nodes - 1}")
    return NodeInfo(rank, host, port, nodes)


def nodes_started(env: Mapping[str, str] = os.environ) -> int:
    """Return on how many machines Kubernetes runs this program, as torchrun would read it; else 1."""
    known = env.get("PET_NNODES", "1").rpartition(":")[2]
    return int(known) if known.isdigit() else 1


def is_rank_zero(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process prints results and writes files: it is rank 0, or it runs alone."""
    if "RANK" in env:
        return env["RANK"] == "0"
    info = find_rank_info(env)
    return info is None or info.rank == 0


def find_rank_info(env: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Return what loopkit's launcher, torchrun, deepspeed or srun wrote into the environment.

    Returns:
        None if no launcher started this process.

    Raises:
        OptionError: the environment has a rank but not all that belongs to it.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torchrun(env)
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    # A job's own shell has SLURM_NTASKS too, but only a process that srun started has a step.
    if "SLURM_STEP_ID" in env and tasks > 1:
        return _from_slurm(env, tasks)
    return None


def _from_torchrun(env: Mapping[str, str]) -> RankInfo:
    # A PyTorchJob numbers its pods, each of which has devices of its own.
    is_pod = "KUBERNETES_SERVICE_HOST" in env and "LOCAL_RANK" not in env
    if is_pod and env.get("PET_NPROC_PER_NODE", "1") not in ("1", "auto"):
        raise OptionError(
            f"this pod is to run {env['PET_NPROC_PER_NODE']} processes: start the script with torchrun, "
            "as command: [torchrun, train.py]"
        )
    of_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # A store of rank 0 is new in each attempt. Agents on several machines count restarts apart.
    restarts = env.get("TORCHELASTIC_RESTART_COUNT", "0") if of_agent else "0"
    try:
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_size = int(env.get("LOCAL_WORLD_SIZE", 1 if is_pod else size))
        nodes = env.get("GROUP_WORLD_SIZE")
        if nodes is None and size % local_size == 0:
            nodes = str(size // local_size)
        return RankInfo(
            rank=rank,
            size=size,
            local_rank=int(env.get("LOCAL_RANK", 0 if is_pod else rank)),
            local_size=local_size,
            host=env.get("MASTER_ADDR", "127.0.0.1"),
            port=int(env["MASTER_PORT"]),
            attempt=env.get("LOOPKIT_ATTEMPT", restarts),
            hosted="LOOPKIT_PARENT" in env or of_agent,
            nodes=int(nodes) if nodes else None,
        )
    except (KeyError, ValueError) as error:
        raise OptionError(
            f"the environment has RANK={env['RANK']} and no usable {error}: start the script with "
            "torchrun, or without any of RANK, WORLD_SIZE and MASTER_PORT"
        ) from None


def _from_slurm(env: Mapping[str, str], tasks: int) -> RankInfo:
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env["SLURM_STEP_ID"])
    known = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES"))
    return RankInfo(
        rank=int(env["SLURM_PROCID"]),
        size=tasks,
        local_rank=int(env["SLURM_LOCALID"]),
        local_size=int(re.split(r"[(,]", per_node)[0]),
        host=env.get("MASTER_ADDR", first_host(nodes)),
        # Steps of one job may run at the same time, on the same machines.
        port=int(env.get("MASTER_PORT", 15000 + (job + 7919 * step) % 20000)),
        attempt=f"{job}.{step}.{env.get('SLURM_RESTART_COUNT', '0')}",
        nodes=int(known) if known else None,
    )


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: "n[03-07,9],m1" gives "n03"."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return (found[1] + (found[2] or "")) if found else nodes

"""A rank that fails, is killed, hangs or gets a signal: all ranks end soon, with the cause once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from tests import fork_server
from tests.faults.rank_run import TIMEOUT
from tests.support import free_port

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Steps of a run: 400 samples in batches of 8 over two ranks, twice.
ALL = 50


def long(*values: object):
    """A case of the long campaigns: each of these runs starts three processes."""
    return pytest.param(*values, marks=pytest.mark.long)


def start(
    run_dir: Path,
    how: str = "none",
    where: str = "none",
    rank: int = 0,
    launcher: tuple[str, ...] = (),
    popen: Any = fork_server.Popen,
    **env: str,
):
    run_dir.mkdir(exist_ok=True)
    words = [
        *(launcher or (sys.executable,)),
        "-m",
        "tests.faults.rank_run",
        str(run_dir),
        how,
        where,
        str(rank),
    ]
    return popen(
        words,
        cwd=ROOT,
        env={**ENV, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process, limit: float = 240) -> tuple[int, list[str], str]:
    out, err = process.communicate(timeout=limit)
    return process.returncode, out.splitlines(), err


def read_until(process, text: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came: {lines} {process.stderr.read()}")


def left_over(run_dir: Path) -> list[str]:
    """Return the processes of this run that still live."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid,stat,args"], capture_output=True, text=True
    ).stdout.splitlines()
    return [line for line in listed if str(run_dir) in line and " Z" not in line[:20]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """What executed processes end with; the other launchers of this file fork their ranks."""
    code, lines, err = finish(start(tmp_path_factory.mktemp("whole"), popen=subprocess.Popen))
    assert code == 0, err
    assert lines[-1].startswith(f"end finished  {ALL} ")
    assert lines.count("step 7") == 1, "what ranks print shows once"
    return lines[-1].split()[-1]


@pytest.mark.parametrize(
    ("where", "rank"),
    [("step", 1), ("data", 1), ("eval", 0), long("step", 0), long("hook", 1), long("save", 1)],
)
def test_a_rank_that_raises_ends_all_and_its_traceback_comes_last_and_once(
    tmp_path, where, rank, whole
):
    process = start(tmp_path / "run", "raise", where, rank)
    read_until(process, "step 1")
    code, _, err = finish(process)
    assert code == 1
    assert err.count("Traceback") == (2 if where == "data" else 1), (
        err
    )  # a failed read is wrapped, with its cause
    assert f"rank {rank} failed:" in err
    assert (
        err.strip()
        .splitlines()[-1]
        .startswith("loopkit.errors.DataError" if where == "data" else "ValueError: bad batch 17")
    )
    assert not left_over(tmp_path)
    # The run resumes from what was saved.
    if where in ("eval", "save"):
        code, lines, err = finish(start(tmp_path / "run"))
        assert lines[-1].split()[-1] == whole, err


@pytest.mark.parametrize("rank", [long(0), 1])
def test_a_rank_that_is_killed_is_named_and_the_run_resumes_later(tmp_path, rank, whole):
    process = start(tmp_path / "run", "kill", "step", rank)
    read_until(process, "step 8")
    began = time.monotonic()
    code, _, err = finish(process)
    assert time.monotonic() - began < 15
    assert code == 128 + signal.SIGKILL
    assert err.strip().splitlines()[-1].startswith(f"rank {rank} was ended by signal SIGKILL")
    assert "Traceback" not in err
    code, lines, err = finish(start(tmp_path / "run"))
    assert lines[-1].split()[-1] == whole, err


@pytest.mark.parametrize(("how", "rank"), [("stop", 0), ("hang", 1), long("stop", 1)])
def test_a_rank_that_hangs_is_named_and_all_end_within_the_limit(tmp_path, how, rank):
    process = start(tmp_path / "run", how, "step", rank)
    read_until(process, "step 8")
    began = time.monotonic()
    code, _, err = finish(process)
    assert code == 75, err
    # Its limit and 5 s, and room for a busy machine.
    assert time.monotonic() - began < TIMEOUT + 15
    assert re.search(rf"hung: rank {rank} ", err), err
    assert ("stopped" in err) == (how == "stop")
    assert how != "hang" or "rank_run.py" in err, "where it hangs"
    assert not left_over(tmp_path)


def test_a_rank_that_is_slow_is_waited_for(tmp_path, whole):
    code, lines, err = finish(start(tmp_path / "run", "slow", "step", 1))
    assert code == 0, err
    assert lines[-1].split()[-1] == whole


def test_a_rank_that_exits_without_a_report_is_named(tmp_path):
    code, _, err = finish(start(tmp_path / "run", "exit", "hook", 1))
    assert code == 3
    assert "rank 1 ended with exit code 3 while the others continued" in err


def ranks_of(run_dir: Path, launcher: int) -> list[int]:
    pids = [int(line.split()[0]) for line in left_over(run_dir)]
    return [pid for pid in pids if pid != launcher]


@pytest.mark.parametrize("whom", ["launcher", "rank", long("all")])
def test_sigterm_saves_on_all_ranks_and_exits_143(tmp_path, whom, whole):
    process = start(tmp_path / "run")
    seen = read_until(process, "step 6")
    ranks = ranks_of(tmp_path, process.pid)
    assert len(ranks) == 2
    for pid in {"launcher": [process.pid], "rank": ranks[1:], "all": ranks}[whom]:
        os.kill(pid, signal.SIGTERM)
    code, lines, err = finish(process)
    assert code == 143, err
    last = max(int(line.split()[1]) for line in [*seen, *lines] if line.startswith("step"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:012}").is_dir()
    assert last < ALL
    if whom == "rank":
        code, lines, err = finish(start(tmp_path / "run"))
        assert lines[-1].split()[-1] == whole, err


def test_ctrl_c_saves_and_the_script_continues(tmp_path, whole):
    process = start(tmp_path / "run")
    read_until(process, "step 6")
    process.send_signal(signal.SIGINT)
    code, lines, err = finish(process)
    assert code == 0, err
    assert lines[-1].startswith("end interrupted SIGINT")
    code, lines, err = finish(start(tmp_path / "run"))
    assert lines[-1].split()[-1] == whole, err


def test_no_rank_outlives_its_launcher(tmp_path):
    process = start(tmp_path / "run", popen=subprocess.Popen)
    read_until(process, "step 3")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while left_over(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left_over(tmp_path)


@pytest.mark.parametrize(
    ("how", "rank", "reported"),
    [
        ("raise", 1, "rank 1: Traceback"),
        long("kill", 1, "Signal 9 (SIGKILL)"),
        long("hang", 1, "hung: rank 1 did not come"),
    ],
)
def test_under_torchrun_the_cause_is_reported_too(tmp_path, how, rank, reported):
    process = start(tmp_path / "run", how, "step", rank, launcher=tuple(TORCHRUN))
    read_until(process, "step 8")
    began = time.monotonic()
    code, _, err = finish(process)
    assert code == 1
    assert time.monotonic() - began < TIMEOUT + 15
    cause = err[err.index("Root Cause") :]
    assert reported in cause, err
    assert err.count("bad batch 17") == (2 if how == "raise" else 0), (
        err
    )  # the line that raises it, and what it says


@pytest.mark.parametrize("how", [long("raise"), "kill"])
def test_torchrun_restarts_from_the_newest_checkpoint(tmp_path, how, whole):
    launcher = (*TORCHRUN, "--max-restarts", "2", "--monitor-interval", "0.1")
    code, lines, err = finish(start(tmp_path / "run", how, "step", 1, launcher=launcher))
    assert code == 0, err
    assert lines[-1].split()[-1] == whole
    assert (tmp_path / "run" / "failed").exists()


def test_deepspeeds_launcher_gives_a_rank(rank_programs, tmp_path, whole):
    launcher = (
        sys.executable,
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        "2",
        "--no_local_rank",
        f"--master_port={free_port()}",  # its own default is the same for every run on a machine
        "--module",
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    words = [*launcher, "tests.faults.rank_run", str(run_dir), "none", "none", "0"]
    done = rank_programs.run(
        words,
        cwd=ROOT,
        env={
            **ENV,
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(sys.executable).parent}:{ENV['PATH']}",
        },
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if line.startswith("end finished")]
    assert {line.split()[-1] for line in ends} == {whole}


@pytest.mark.parametrize("under", ["fsdp", long("deepspeed")])
def test_the_other_strategies_resume_after_a_kill_too(tmp_path, under):
    code, lines, err = finish(start(tmp_path / "whole", UNDER=under))
    assert code == 0, err
    first = start(tmp_path / "run", "kill", "step", 1, UNDER=under)
    assert finish(first)[0] == 128 + signal.SIGKILL
    code, rest, err = finish(start(tmp_path / "run", UNDER=under))
    assert rest[-1].split()[-1] == lines[-1].split()[-1], err


def test_slurms_variables_give_a_rank():
    from loopkit.distributed.environment import find_rank_info

    env = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
        "SLURM_JOB_ID": "70042",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    }
    info = find_rank_info(env)
    assert (info.rank, info.size, info.local_rank, info.local_size) == (11, 16, 3, 8)
    assert (info.host, info.port, info.hosted) == ("node07", 15000 + 70042 % 20000, False)
    assert find_rank_info({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16"}) is None, (
        "a job's own shell is not a step"
    )


@pytest.mark.parametrize(
    "other", [{"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "5"}]
)
@pytest.mark.parametrize("shared", [{}, {"MASTER_PORT": "29500"}])
def test_steps_of_one_job_do_not_meet(other, shared):
    from loopkit.distributed.environment import find_rank_info

    env = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "4711",
        **shared,
    }
    one, two = find_rank_info(env), find_rank_info(env | other)
    assert one.attempt != two.attempt, "they share no key of a store"
    if "SLURM_STEP_ID" in other and not shared:
        assert one.port != two.port


@pytest.mark.parametrize(
    ("env", "nodes"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({"WORLD_SIZE": "4"}, 1),
        ({"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3"}, 3),
    ],
)
def test_a_launcher_tells_the_number_of_machines(env, nodes):
    from loopkit.distributed.environment import find_rank_info

    assert find_rank_info({"RANK": "1", "MASTER_PORT": "1", **env}).nodes == nodes


def test_a_port_that_another_process_holds_is_named(monkeypatch):
    import socket
    from datetime import timedelta

    from loopkit.distributed.environment import RankInfo
    from loopkit.distributed.process_group import _connect
    from loopkit.errors import OptionError

    # An earlier test may have left the group of one process, which lives as long as the process.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        info = RankInfo(0, 2, 0, 2, "127.0.0.1", port)
        with pytest.raises(
            OptionError, match=f"port {port}, where the ranks are to meet, is taken"
        ):
            _connect(info, timedelta(seconds=2))


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of processes")
@pytest.mark.parametrize("changed", [None, 0, 1, 2])
def test_only_the_process_that_was_meant_is_killed(changed):
    from loopkit.distributed.heartbeat import identity_of, kill_process

    sleeper = subprocess.Popen(["sleep", "100"])
    try:
        identity = identity_of(sleeper.pid)
        assert identity is not None
        if changed is not None:  # another boot, another container, another start
            identity[changed] += "0"
        kill_process(sleeper.pid, identity)
        if changed is None:
            assert sleeper.wait(10) == -signal.SIGKILL
        else:
            kill_process(sleeper.pid, None)
            with pytest.raises(subprocess.TimeoutExpired):
                sleeper.wait(0.3)
    finally:
        sleeper.kill()
        sleeper.wait()


TASK = """
import os
from tests.support import Tiny

class Odd(Tiny):
    def __init__(self, fail: int = -1) -> None:
        super().__init__()
        self.fail, self.steps = fail, 0

    def train_step(self, batch):
        self.steps += 1
        if self.steps == 3 and os.environ.get("RANK") == str(self.fail):
            raise ValueError("bad batch 17")
        return super().train_step(batch)
"""


def test_the_command_line_starts_ranks_and_reports_the_cause(tmp_path):
    (tmp_path / "odd.py").write_text(TASK)
    words = [
        sys.executable,
        "-m",
        "loopkit",
        "fit",
        "odd.py",
        "--strategy",
        "ddp",
        "--devices",
        "2",
        "--batch-size",
        "4",
    ]
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    done = fork_server.run(
        [*words, "--run-dir", "one"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("***** finished *****") == 1
    assert "DDP x 2" in done.stderr
    failing = [*words, "--run-dir", "two", "--fail", "1"]
    done = fork_server.run(
        failing, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "ValueError: bad batch 17"
    taken = fork_server.run(
        [*words, "--run-dir", "one"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert taken.returncode == 73
    assert taken.stderr.count("pass resume='auto'") == 1


@pytest.mark.long
@pytest.mark.parametrize("attempt", range(20))
@pytest.mark.parametrize(
    ("how", "where"), [("raise", "step"), ("kill", "step"), ("stop", "step"), ("hang", "step")]
)
def test_failures_end_alike_twenty_times_in_a_row(tmp_path, how, where, attempt):
    rank = attempt % 2
    code, _, err = finish(start(tmp_path / "run", how, where, rank))
    assert code == {"raise": 1, "kill": 137, "stop": 75, "hang": 75}[how], err
    assert f"rank {rank}" in err
    assert not left_over(tmp_path)

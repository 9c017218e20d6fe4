"""Rank 0 first, rank 0 alone, and the facts of a run, under the environments of several launchers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from loopkit import is_rank_zero, rank_zero_first, rank_zero_only
from loopkit.errors import HungError, OptionError
from tests.support import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time
from pathlib import Path
from loopkit import is_rank_zero, rank_zero_first, rank_zero_only
from tests.support import Tiny, quiet

folder, local, fails = Path(sys.argv[1]), "local" in sys.argv, "fails" in sys.argv
made = folder / "made"

class Prepared(Tiny):
    def train_data(self):
        with rank_zero_first(local=local):
            second = (folder / "second").exists()
            (folder / "second").touch()
        seen.append(second)
        return super().train_data()

    def optimizers(self, run):
        seen.append((run.length.steps, run.length.steps_per_epoch, run.world_size, run.rank))
        return super().optimizers()

seen = []
with rank_zero_first(local=local):
    if fails and is_rank_zero():
        raise OSError("no network")
    seen.append(made.exists())
    if not made.exists():
        time.sleep(0.3)  # long enough for another rank to look, if it did not wait
        made.touch()

@rank_zero_only
def say(text):
    print("said", text)
    return text

seen.append(say("hello"))
quiet(strategy="ddp", devices=2, accelerator="cpu", batch_size=5, epochs=2, eval_every="never").run(Prepared())
print(seen, flush=True)
"""


def environments(launcher: str, tmp_path: Path) -> list[dict[str, str]]:
    """The environment of each of two processes, as torchrun without an agent's store or srun sets it."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM_", "RANK", "WORLD_"))}
    common = kept | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    if launcher == "srun":
        common |= {
            "SLURM_STEP_ID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_JOB_ID": "7",
        }
        return [common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    return [common | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def started(
    programs: Any, launcher: str, tmp_path: Path, *options: str
) -> list[subprocess.CompletedProcess[str]]:
    processes = [
        programs.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), *options],
            env=env,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for env in environments(launcher, tmp_path)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    return [
        subprocess.CompletedProcess([], process.returncode, *end)
        for process, end in zip(processes, ends)
    ]


@pytest.mark.parametrize(("launcher", "options"), [("srun", []), ("torchrun", ["local"])])
def test_rank_0_prepares_before_the_run_and_within_it(rank_programs, launcher, options, tmp_path):
    first, second = started(rank_programs, launcher, tmp_path, *options)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == "said hello\n[False, 'hello', False, (12, 6, 2, 0)]\n"
    assert second.stdout == "[True, None, True, (12, 6, 2, 1)]\n"


def test_the_others_do_not_wait_for_a_rank_0_that_failed(rank_programs, tmp_path):
    first, second = started(rank_programs, "srun", tmp_path, "fails")
    assert "OSError: no network" in first.stderr
    assert "rank 0 has failed in rank_zero_first()" in second.stderr


def late(timeout):
    """Rank 0 needs longer than the others wait."""
    try:
        with rank_zero_first(timeout=timeout):
            if os.environ["RANK"] == "0":
                threading.Event().wait(4 * timeout)
    except HungError as error:
        return str(error)
    return ""


def test_the_others_wait_as_long_as_the_timeout_says(pair):
    first, second = pair.call(late, 0.3)
    assert first == ""
    assert "rank 0 has not left rank_zero_first() within 0.3 s" in second


def test_a_process_that_runs_alone_does_not_wait():
    with rank_zero_first(), rank_zero_first(local=True):
        pass
    assert rank_zero_only(lambda value: value + 1)(1) == 2
    with (
        pytest.raises(OptionError, match=r"rank_zero_first\(timeout=0\)"),
        rank_zero_first(timeout=0),
    ):
        pass


@pytest.mark.parametrize(
    ("env", "prints"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, True),
        ({"RANK": "1"}, False),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
            False,
        ),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            True,
        ),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, True),  # the shell of a job
    ],
)
def test_one_process_prints_under_every_launcher(env, prints):
    assert is_rank_zero(env) is prints

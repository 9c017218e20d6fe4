"""The end of a SLURM job: read where SLURM tells it, said at the start, and met in time."""

from __future__ import annotations

import os
import time

import pytest

from loopkit.distributed.job_end import find_job_end, seconds_of
from loopkit.errors import LoopkitError, LoopkitWarning, OptionError
from tests.support import Tiny, quiet


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A squeue that answers what the test writes."""
    program = tmp_path / "squeue"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return (tmp_path / "answer").write_text


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:07", 7), ("59:59", 3599), ("2:03:04", 7384), ("1-02:03:04", 93784)]
)
def test_lengths_of_time_as_slurm_writes_them(text, seconds):
    assert seconds_of(text) == seconds


def test_the_end_of_a_job(squeue):
    assert find_job_end({}) is None
    assert find_job_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1790000000"}) == 1790000000.0
    squeue("10:00\n")
    assert find_job_end() == pytest.approx(time.time() + 600, abs=60)
    squeue("UNLIMITED\n")
    assert find_job_end() is None
    squeue("slurm_load_jobs error\n")
    with pytest.raises(LoopkitError, match="SLURM does not tell when job 7 ends"):
        find_job_end()


def test_a_run_ends_before_its_job_and_saves(squeue, tmp_path, monkeypatch, capsys):
    squeue("0:39\n")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 40))
    fit = quiet(
        steps=10**9, run_dir=tmp_path / "run", checkpoint=True, job_margin="39 s", progress="plain"
    )
    with pytest.raises(SystemExit) as ended:
        fit.run(Tiny())
    assert ended.value.code == 143
    said = capsys.readouterr().err
    assert "SLURM ends this job at" in said
    assert "39 s before" in said
    assert "the end of its SLURM job: finishing step" in said
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_limit_that_is_raised_meanwhile_is_noticed(squeue, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 40))
    squeue("20:00:00\n")
    fit = quiet(steps=10**9, job_margin="41 s", time=1.5)
    assert fit.run(Tiny()).status == "finished"


def test_the_option(squeue):
    squeue("0:01\n")
    assert quiet(steps=3, job_margin=False).run(Tiny()).status == "finished"
    squeue("no answer\n")
    with pytest.warns(LoopkitWarning, match="#SBATCH --signal=TERM@120"):
        assert quiet(steps=3).run(Tiny()).status == "finished"
    for wrong in (True, 0, "5 steps"):
        with pytest.raises(OptionError, match="job_margin"):
            quiet(job_margin=wrong)

"""A real SLURM: started, signalled, timed out, cancelled, preempted and requeued, beside other steps and jobs."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.programs import models, need, outcome, steps_of, train, wait_for
from tests.cluster.slurm import NODES, PROGRAMS, Job, Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
TWO = ("--nodes=2", "--ntasks=2")


@pytest.fixture(scope="module")
def running() -> Iterator[Slurm]:
    need(*PROGRAMS)
    cluster = Slurm(Path(tempfile.mkdtemp(prefix="lk-slurm-", dir="/tmp")))
    yield cluster
    cluster.close()


@pytest.fixture
def slurm(running) -> Iterator[Slurm]:
    yield running
    running.cancel_all()


def script(run_dir: str, *srun: str, **given) -> str:
    """Return a batch script that trains, and says how that ended."""
    command = shlex.join(["srun", *srun, *train(run_dir, **given)])
    return f"#!/bin/bash\n{command}\nstatus=$?\necho srun ended with $status\nexit $status\n"


def saved(job: Job) -> int:
    """Return the exit code of a job's srun."""
    job.end()
    lines = [line for line in job.text().splitlines() if line.startswith("srun ended with")]
    assert lines, job.text()
    return int(lines[-1].split()[-1])


def test_srun_on_nodes_of_other_names_trains_to_the_bits_of_one_machine(slurm, tmp_path, whole):
    job = slurm.submit(tmp_path, script("run", nodes=2), *TWO)
    assert job.end()["NodeList"] == ",".join(sorted(NODES))
    assert outcome(job.text()) == whole.outcome
    assert models(tmp_path / "run") == models(whole.run_dir)


def test_jobs_of_an_array_are_runs_of_their_own(slurm, tmp_path, whole):
    words = script("run-$SLURM_ARRAY_TASK_ID").replace(
        "'run-$SLURM_ARRAY_TASK_ID'", "run-$SLURM_ARRAY_TASK_ID"
    )
    job = slurm.submit(tmp_path, words, "--array=3-4", "--nodes=1", "--ntasks=2")
    wait_for(lambda: not slurm.call("squeue", "-h"), "the end of the array")
    for number in (3, 4):
        assert outcome(job.text(f"-{number}")) == whole.outcome
        assert models(tmp_path / f"run-{number}") == models(whole.run_dir)


def test_two_steps_of_one_job_at_once_do_not_mix(slurm, tmp_path, whole):
    lines = ["#!/bin/bash"]
    for name in ("a", "b"):
        step = shlex.join(["srun", "--ntasks=2", "--nodes=2", "--overlap", *train(f"run-{name}")])
        lines.append(f"{step} > step-{name}.txt 2>&1 &")
    job = slurm.submit(tmp_path, "\n".join([*lines, "wait", ""]), "--nodes=2", "--ntasks=4")
    job.end()
    for name in ("a", "b"):
        assert outcome((tmp_path / f"step-{name}.txt").read_text()) == whole.outcome
        assert models(tmp_path / f"run-{name}") == models(whole.run_dir)


def resumes(slurm, tmp_path, whole) -> None:
    """Start the run again, and compare its end with the run that was never disturbed."""
    last = int(steps_of(tmp_path / "run")[-1].removeprefix("step-").split("-")[0])
    job = slurm.submit(tmp_path, script("run"), *TWO)
    job.end()
    assert f"began {last} of 2" in job.text(), job.text()
    assert outcome(job.text()) == whole.outcome


def test_scancel_saves_on_both_nodes(slurm, tmp_path, whole):
    job = slurm.submit(tmp_path, script("run", pause=0.1), *TWO)
    job.until("step 10\n")
    # To the steps of the job, as SLURM itself does before the limit; the shell continues.
    slurm.call("scancel", "--signal=TERM", job.number)
    assert saved(job) == 143, job.text()
    resumes(slurm, tmp_path, whole)


def test_a_signal_before_the_limit_saves_and_ends(slurm, tmp_path, whole):
    given = {"pause": 1.0, "job_margin": "False"}
    # SLURM sends it up to a minute earlier than asked.
    job = slurm.submit(tmp_path, script("run", **given), *TWO, "--signal=TERM@60", "--time=25")
    job.until("step 2\n")
    job.end_soon()
    assert saved(job) == 143, job.text()
    assert job.about()["JobState"] == "FAILED", "the script hands the code on"
    resumes(slurm, tmp_path, whole)


def test_a_run_saves_and_ends_by_itself_before_its_job_does(slurm, tmp_path, whole):
    # The margin is all of the job, so that it ends as soon as it may.
    given = {"pause": 0.3, "job_margin": "1499 s", "progress": 1}
    job = slurm.submit(tmp_path, script("run", **given), *TWO, "--time=25")
    assert saved(job) == 143, job.text()
    assert "SLURM ends this job at" in job.text()
    assert "1499 s before" in job.text()
    assert "the end of its SLURM job: finishing step" in job.text()
    resumes(slurm, tmp_path, whole)


def test_a_time_limit_that_is_not_heeded_saves_by_slurms_signal(slurm, tmp_path, whole):
    given = {"pause": 3.0, "job_margin": "False"}
    job = slurm.submit(tmp_path, script("run", **given), *TWO, "--time=25")
    job.until("step 2\n")
    job.end_soon()
    assert job.end()["JobState"] == "TIMEOUT"
    assert "SLURM ends this job" not in job.text()
    assert steps_of(tmp_path / "run"), job.text()
    resumes(slurm, tmp_path, whole)


def of_docs(**given) -> str:
    """Return the batch file of docs/clusters.md, with the script of these tests in place of train.py."""
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    text = page.split('```bash title="job.sh"\n', 1)[1].split("```", 1)[0]
    assert "#SBATCH --requeue" in text
    return text.replace("python train.py", shlex.join(train("run", **given)))


HERE = (*TWO, "--ntasks-per-node=1", "--gpus-per-node=0", "--time=25")


def test_a_preempted_job_is_requeued_and_resumes_to_the_same_bits(slurm, tmp_path, whole):
    job = slurm.submit(tmp_path, of_docs(pause=0.3), *HERE, "--partition=low")
    job.until("step 10\n")
    text = "#!/bin/bash\ntrue\n"
    urgent = slurm.submit(tmp_path, text, "--nodes=2", "--exclusive", "--partition=high")
    assert urgent.end()["JobState"] == "COMPLETED"
    assert job.end()["Restarts"] == "1", job.text()
    starts = [line.split()[1] for line in job.text().splitlines() if line.startswith("began")]
    assert starts[0] == "0"
    assert int(starts[1]) >= 10, job.text()
    assert outcome(job.text()) == whole.outcome


def test_the_batch_file_of_the_docs_requeues_itself_until_it_is_done(slurm, tmp_path, whole):
    # In its first life the margin is all of the job, so that it ends as soon as it may.
    job = slurm.submit(tmp_path, of_docs(job_margin="1499 s", once=1, pause=0.3), *HERE)
    assert job.end()["Restarts"] == "1", job.text()
    assert outcome(job.text()) == whole.outcome

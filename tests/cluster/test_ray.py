"""A real Ray: training by TorchTrainer, workers killed and restarted, checkpoints handed over, trials pruned."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest

from loopkit import Fit
from loopkit.checkpoint import Store, verify_checkpoint
from loopkit.errors import OptionError
from loopkit.loggers.jsonl import read_rows
from tests.cluster import ray_jobs
from tests.cluster.programs import PYTHON, ROOT, Program, models, steps_of, wait_for
from tests.cluster.ray_jobs import noted
from tests.cluster.train import STEPS, Slow
from tests.docs.pages import DOCS, blocks, matches
from tests.support import Tiny, quiet

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
STORE = 256 << 20  # bytes of Ray's object store, which the tests hardly use


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A Ray of three CPUs on this machine; its folder, whose path is short enough for sockets."""
    if find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'loopkit-torch[ray]'")
    folder = Path(tempfile.mkdtemp(prefix="lk-ray-", dir="/tmp"))
    token = folder / "token"  # else Ray leaves one in the home directory
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        import ray  # reads the variables when it is imported

        try:
            ray.init(
                num_cpus=3,
                include_dashboard=False,
                object_store_memory=STORE,
                _temp_dir=str(folder),
                log_to_driver=False,
            )
            yield folder
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def fit(function: Any, folder: Path, workers: int = 2, failures: int = 0, **config: Any) -> Any:
    """Run a function by TorchTrainer; return Ray's result."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        function,
        train_loop_config={"folder": str(folder), **config},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder / "storage"),
            failure_config=FailureConfig(max_failures=failures),
        ),
    ).fit()


def reported(result: Any) -> list[int]:
    """Return the step of each checkpoint that Ray keeps, in the order of the reports."""
    for checkpoint, metrics in result.best_checkpoints:
        assert Path(checkpoint.path).name == f"step-{metrics['step']:012d}"
        assert verify_checkpoint(Store(), Path(checkpoint.path)) == []
    return [metrics["step"] for _, metrics in result.best_checkpoints]


def losses(run_dir: Path) -> list[dict[str, float]]:
    """Return the rows that a run logged, without what depends on the clock."""
    timed = {"time", "eval/runtime", "eval/samples_per_second"}
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def kill_after(folder: Path, rank: int, what: Callable[[], Any]) -> threading.Thread:
    """Kill the process of a rank, once, as soon as ``what`` is true."""

    def kill() -> None:
        wait_for(what, "the moment to kill")
        os.kill(noted(folder, f"pid-{rank}")[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_two_workers_train_to_the_bits_of_two_ranks_and_each_checkpoint_is_reported_once(
    cluster, tmp_path, whole
):
    options = {"strategy": "auto", "run_dir": str(tmp_path / "run")}
    result = fit(ray_jobs.training, tmp_path, options=options)
    assert noted(tmp_path, "outcome") == [whole.outcome[:-1]] * 2
    assert models(tmp_path / "run") == models(whole.run_dir)
    assert losses(tmp_path / "run") == losses(whole.run_dir)
    assert reported(result) == list(range(4, STEPS + 1, 4))
    assert result.metrics["eval/loss"].hex() == whole.outcome[2]
    by_step = {metrics["step"]: metrics.get("eval/loss") for _, metrics in result.best_checkpoints}
    rows = {row["step"]: row["eval/loss"] for row in losses(whole.run_dir) if "eval/loss" in row}
    assert by_step == {step: rows.get(step) for step in by_step}, "metrics of a step's own"
    trained = Slow.load(result.checkpoint).state_dict()
    last = Slow.load(tmp_path / "run").state_dict()
    assert all((trained[name] == last[name]).all() for name in last)
    assert list((tmp_path / "run" / ".ray").iterdir()) == [], "nothing is staged any more"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_restarted_and_the_run_ends_with_the_same_bits(
    cluster, tmp_path, whole, rank
):
    run_dir = tmp_path / "run"
    killer = kill_after(tmp_path, rank, (run_dir / f"checkpoints/step-{12:012d}").exists)
    options = {"run_dir": str(run_dir)}
    result = fit(ray_jobs.training, tmp_path, failures=2, options=options)
    killer.join()
    assert len(noted(tmp_path, "pid")) == 4, "two workers, twice"
    assert noted(tmp_path, "outcome") == [whole.outcome[:-1]] * 2
    assert models(run_dir) == models(whole.run_dir)
    assert losses(run_dir) == losses(whole.run_dir)
    steps = reported(result)
    assert steps == sorted(set(steps)), "each once"
    assert steps[-1] == STEPS
    assert set(steps) >= set(range(16, STEPS + 1, 4)), "all those after the restart"


def test_a_restart_continues_from_what_ray_keeps_where_the_run_directory_is_lost(
    cluster, tmp_path, whole
):
    kept = tmp_path / "storage/ray/checkpoint_manager_snapshot.json"
    known = f"step-{8:012d}"
    killer = kill_after(tmp_path, 1, lambda: kept.exists() and known in kept.read_text())
    result = fit(ray_jobs.training, tmp_path, failures=2, from_ray=True)
    killer.join()
    assert len(noted(tmp_path, "pid")) == 4, "two workers, twice"
    assert noted(tmp_path, "outcome") == [whole.outcome[:-1]] * 2
    first, again = [Path(path).name for path in noted(tmp_path, "from-0")]
    assert (first, again >= known) == ("", True)
    assert reported(result)[-1] == STEPS
    rows = [row for row in losses(whole.run_dir) if row["step"] > int(again[5:])]
    newest = sorted(cluster.glob("session_*/**/runs/slow/2/metrics.jsonl"))[-1]
    assert losses(newest.parent) == rows


def test_shards_of_two_workers_reach_ray_as_one_checkpoint(cluster, tmp_path, whole_fsdp):
    options = {"run_dir": str(tmp_path / "run")}
    result = fit(ray_jobs.training, tmp_path, given={"under": "fsdp"}, options=options)
    assert noted(tmp_path, "outcome") == [whole_fsdp.outcome[:-1]] * 2
    assert models(tmp_path / "run") == models(whole_fsdp.run_dir)
    assert reported(result)[-1] == STEPS
    assert len(list(Path(result.checkpoint.path).glob("**/model*.safetensors"))) == 2


def test_one_worker_trains_alone_and_a_run_that_is_over_is_reported_again(cluster, tmp_path):
    options = {"run_dir": str(tmp_path / "run"), "strategy": "auto", "steps": 8}
    first = fit(ray_jobs.training, tmp_path, workers=1, options=options)
    assert (reported(first), steps_of(tmp_path / "run")[-1]) == ([4, 8], "step-000000000008")
    shutil.rmtree(tmp_path / "storage")
    again = fit(ray_jobs.training, tmp_path, workers=1, options=options)
    assert reported(again) == [8]
    assert again.metrics["eval/loss"] == first.metrics["eval/loss"]


def test_what_ranks_do_outside_of_a_run_meets_in_the_store_of_rays_group(cluster, tmp_path):
    fit(ray_jobs.exporting, tmp_path)
    assert [len(noted(tmp_path, "exported-0")), len(noted(tmp_path, "exported-1"))] == [1, 1]
    first, second = noted(tmp_path, "entered")
    assert second - first >= 0.2


CASES = {
    "single": ({"strategy": "single"}, "SingleDevice trains in one process, and this one is rank"),
    "relative": (
        {"reports": True, "checkpoint": True, "run_dir": "runs/a"},
        r"run_dir='runs/a': Ray runs each worker in a directory of its own, .*absolute path",
    ),
    "devices": ({"devices": 3}, "devices=3, and 2 processes were started"),
}


def test_what_cannot_work_under_a_trainer_is_refused_before_the_first_step(cluster, tmp_path):
    cases = {name: dict(options) for name, (options, _) in CASES.items()}
    cases["single"] |= {"checkpoint": True, "run_dir": str(tmp_path / "single")}
    fit(ray_jobs.refused, tmp_path, cases=cases)
    for name, (_, message) in CASES.items():
        assert len(found := noted(tmp_path, name)) == 2, name
        assert all(re.search(message, text) for text in found), found


def test_a_plain_task_of_ray_starts_no_ranks_and_reports_to_nobody(cluster, tmp_path):
    import ray

    cases = {"ranks": {"devices": 2}, "nobody": {"reports": True}}
    ray.get(ray.remote(ray_jobs.refused).remote({"folder": str(tmp_path), "cases": cases}))
    assert (
        "this process is a worker of Ray, and several devices need several"
        in noted(tmp_path, "ranks")[0]
    )
    assert "neither a TorchTrainer nor a Tuner runs this process" in noted(tmp_path, "nobody")[0]


def test_tune_keeps_the_checkpoints_of_a_trial_with_their_metrics(cluster, tmp_path):
    from ray import tune

    tuner = tune.Tuner(
        ray_jobs.trial,
        param_space={"lr": 0.01},
        tune_config=tune.TuneConfig(metric="eval/loss", mode="min"),
        run_config=tune.RunConfig(name="trial", storage_path=str(tmp_path), verbose=0),
    )
    result = tuner.fit().get_best_result()
    assert result.metrics["training_iteration"] == 4, "two evaluations and two checkpoints"
    assert verify_checkpoint(Store(), Path(result.checkpoint.path)) == []
    loss = quiet().evaluate(Tiny(), checkpoint=result.checkpoint)["eval/loss"]
    assert loss == result.metrics["eval/loss"]


@pytest.fixture
def typed(cluster, tmp_path) -> Path:
    """A folder with the files of docs/ray.md, in which a folder takes the place of /shared."""
    for block in blocks(DOCS / "ray.md"):
        if block.title:
            text = block.text.replace("/shared", str(tmp_path / "shared"))
            (tmp_path / block.title).write_text(text)
    return tmp_path


def start(script: str, folder: Path) -> Program:
    """Start a script as a user does, beside the Ray that runs already."""
    import ray

    address = ray.get_runtime_context().gcs_address
    return Program([PYTHON, script], folder / f"{script}.txt", folder, RAY_ADDRESS=address)


def own_lines(program: Program) -> list[str]:
    """Return what the script itself printed: Ray shows the lines of workers in between, or later."""
    return [line for line in program.text().splitlines() if "pid=" not in line]


def test_the_training_of_the_docs_prints_what_they_show(typed):
    program = start("train.py", typed)
    assert program.end() == 0, program.text()
    shown = next(b.text for b in blocks(DOCS / "ray.md") if b.language == "text")
    printed = own_lines(program)
    assert matches(shown, "\n".join(printed[-len(shown.splitlines()) :])), program.text()


def test_the_search_of_the_docs_prunes_trials_and_names_the_best(typed):
    from ray import tune

    script = (typed / "search.py").read_text()
    # The best first: those that come last are behind for certain.
    rates = "tune.grid_search([0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4])"
    for drawn, given in (("tune.loguniform(1e-4, 1.0)", rates), ("num_samples=8", "num_samples=1")):
        assert drawn in script
        script = script.replace(drawn, given)
    (typed / "search.py").write_text(script)
    program = start("search.py", typed)
    assert program.end() == 0, program.text()
    trials = tune.ExperimentAnalysis(typed / "shared/ray/search").trials
    iterations = [trial.last_result["training_iteration"] for trial in trials]
    assert (len(iterations), max(iterations)) == (8, 8)
    assert min(iterations) < 8, "some were pruned"
    best = min(trial.last_result["eval/loss"] for trial in trials)
    assert str(best) in own_lines(program)[-1]


def test_a_checkpoint_that_ray_keeps_in_a_store_is_a_url():
    train = pytest.importorskip("ray.train", reason="pip install 'loopkit-torch[ray]'")
    from pyarrow.fs import FSSpecHandler, PyFileSystem, S3FileSystem

    store = S3FileSystem(anonymous=True, region="us-east-1", endpoint_override="127.0.0.1:9")
    kept = train.Checkpoint("bucket/ray/step-000000000004", filesystem=store)
    assert Fit(resume=kept).options.resume == "s3://bucket/ray/step-000000000004"
    memory = PyFileSystem(FSSpecHandler(fsspec.filesystem("memory")))
    with pytest.raises(OptionError, match=r"does not read from .*checkpoint\.to_directory\(\)"):
        Fit(resume=train.Checkpoint("ray/a", filesystem=memory))

"""RayReport: report evaluations and checkpoints to Ray Train, or to a trial of Ray Tune."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loopkit.checkpoint import Store, checkpoints_dir
from loopkit.checkpoint.reader import read_manifest
from loopkit.errors import OptionError, missing_extra
from loopkit.events import Hook
from loopkit.files import link_tree
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run


@checks_keywords
class RayReport(Hook):
    """Report each evaluation to Ray, and each checkpoint with the metrics of its step.

    In a function that TorchTrainer runs, all ranks report to Ray Train, and Ray copies each
    checkpoint into its own storage, in the background. In a trial of Ray Tune, the one process
    reports, and Tune may end the trial there. A report has "step" and "epoch" too, and the latest
    value of every other name that was logged.

    Example::

        def train_func(config):
            fit = Fit(run_dir="/shared/runs/a", resume="auto", hooks=[RayReport()])
            fit.run(Net())

        TorchTrainer(train_func, scaling_config=ScalingConfig(num_workers=2)).fit()

    Args:
        checkpoints: whether Ray gets the checkpoints too. Ray Train keeps no metrics without one,
            so its result is then empty.

    Raises:
        MissingExtraError: Ray is not installed.
        OptionError: before the first step, if neither Ray Train nor Ray Tune runs this process, or
            if a restart by Ray would not find the run again.
    """

    may_request = False

    def __init__(self, checkpoints: bool = True) -> None:
        if find_spec("ray") is None:
            raise missing_extra("ray", "ray", "RayReport")
        self._checkpoints = checkpoints
        self._ray: _Receiver | None = None

    def on_setup(self, run: Run) -> None:
        """Find out who gets the reports."""
        self._ray = None
        if run.loader is None:  # it only evaluates or predicts
            return
        self._ray = _receiver(run, self._checkpoints)
        if self._ray is None:
            raise OptionError(
                "RayReport reports to Ray, and neither a TorchTrainer nor a Tuner runs this process: "
                "give one of them the function that has Fit, or leave RayReport out"
            )

    def on_fit_start(self, run: Run) -> None:
        """Report the checkpoint that the run continues from, unless Ray has it."""
        path = run.record.resumed_from
        if self._ray is None or path is None or run.run_dir is None:
            return
        is_own = path.resolve().parent == checkpoints_dir(run.run_dir).resolve()
        if is_own and not self._ray.has(path):
            self.on_save(run, path)

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Report what is known."""
        if self._ray is not None:
            known = {**run.metrics, **run.record.since_eval, **metrics}
            self._ray.report({**known, "step": run.progress.step, "epoch": run.epochs_done()})

    def on_save(self, run: Run, path: Path) -> None:
        """Report a checkpoint, with the metrics of its step: training is some steps further."""
        if self._ray is None or not self._checkpoints:
            return
        known: dict[str, Any] = {}
        if run.rank == 0:  # whose metrics Ray takes
            about, logged = read_manifest(Store(), path).meta, run.record.logged_at
            for name, value in run.metrics.items():
                if not name.startswith("eval/") and logged.get(name, 0) <= about["step"]:
                    known[name] = value
            known |= {**about["metrics"], "step": about["step"], "epoch": about["epoch"]}
        self._ray.report(known, path)


class _Receiver(Protocol):
    """What gets the reports of this process."""

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None: ...

    def has(self, checkpoint: Path) -> bool: ...


class _TrainWorker:
    """A worker of Ray Train. All workers report as often, and Ray copies what rank 0 gives it.

    Args:
        staging: where the files of a checkpoint lie until Ray has copied them, as links: retention
            may delete the checkpoint meanwhile. None on other ranks than rank 0.
    """

    def __init__(self, train: Any, staging: Path | None) -> None:
        self._train = train
        self._staging = staging
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)  # of a worker that was killed

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        train, given, name = self._train, None, None
        if checkpoint is not None:
            name = checkpoint.name
            if self._staging is not None:
                link_tree(checkpoint, self._staging / name)
                given = train.Checkpoint.from_directory(self._staging / name)
        train.report(
            metrics,
            checkpoint=given,
            checkpoint_dir_name=name,
            # Ray deletes the links when it has copied them.
            checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
        )

    def has(self, checkpoint: Path) -> bool:
        newest = self._train.get_checkpoint()
        return newest is not None and Path(newest.path).name == checkpoint.name


class _Trial:
    """A trial of Ray Tune, which copies a checkpoint while the trial waits.

    Tune wants the metric of the search in every report: one without has those of the last evaluation.
    """

    def __init__(self, tune: Any) -> None:
        self._tune = tune
        self._evaluated: dict[str, Any] = {}

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        tune = self._tune
        given = None if checkpoint is None else tune.Checkpoint.from_directory(checkpoint)
        if checkpoint is None:
            self._evaluated = metrics
        tune.report({**self._evaluated, **metrics}, checkpoint=given)

    def has(self, checkpoint: Path) -> bool:
        return self._tune.get_checkpoint() is not None


def _receiver(run: Run, checkpoints: bool) -> _Receiver | None:
    """Return what runs this process: a worker of Ray Train or a trial of Ray Tune; else None."""
    from ray import train, tune

    try:
        train.get_context()
    except (RuntimeError, DeprecationWarning):  # outside of Ray Train, in a trial of Ray Tune
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = tune.get_context().get_trial_id()
        return None if trial is None else _Trial(tune)
    settings, run_dir = run.options.saves(), run.options.run_dir
    if run_dir is not None and run.options.url is None and not Path(run_dir).is_absolute():
        raise OptionError(
            f"run_dir={str(run_dir)!r}: Ray runs each worker in a directory of its own, {Path.cwd()}. "
            "Give an absolute path on a disk that all machines share, or a URL"
        )
    if checkpoints and settings is not None and settings.save_on_each_node:
        raise OptionError(
            "RayReport gives Ray each checkpoint from rank 0, and Checkpoint(save_on_each_node=True) "
            "leaves parts of it on other machines: leave that out, or pass RayReport(checkpoints=False)"
        )
    staging = run.run_dir / ".ray" if run.rank == 0 and run.run_dir is not None else None
    return _TrainWorker(train, staging)

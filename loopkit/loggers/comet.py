"""CometLogger: Comet, online or into an archive for ``comet upload``."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopkit.errors import LoopkitError
from loopkit.keywords import checks_keywords
from loopkit.loggers.remote import Opening, RemoteLogger, Row
from loopkit.loggers.serialize import flat, plain


@checks_keywords
class CometLogger(RemoteLogger):
    """Scalars by step, hyperparameters flat, 1-D arrays as histograms, square matrices of whole
    numbers as confusion matrices, others as JSON assets.

    Args:
        project, name, timeout: as ``RemoteLogger``; $COMET_PROJECT_NAME.
        workspace: None takes $COMET_WORKSPACE or the account's own.
        tags: of the experiment.
        offline: write archives alone, to be sent by ``comet upload``.
        dir: where archives go, a folder for each attempt; absolute or within the run directory.
        settings: everything else that ``comet_ml.ExperimentConfig`` takes.
    """

    name = extra = "comet"
    package = "comet_ml"
    variables = ("COMET_PROJECT_NAME", "")

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        *,
        workspace: str | None = None,
        tags: Sequence[str] = (),
        offline: bool = False,
        dir: str | Path = "comet",
        timeout: float = 60.0,
        **settings: Any,
    ) -> None:
        super().__init__(project, name, timeout)
        self._workspace, self._tags, self._offline, self._dir = (
            workspace,
            list(tags),
            offline,
            Path(dir),
        )
        self._settings = settings

    def _start(self, opening: Opening) -> str:
        # What comet_ml would find by itself is said here already.
        quiet = {
            "auto_metric_logging": False,
            "auto_param_logging": False,
            "parse_args": False,
            "display_summary_level": 0,
        }
        # comet_ml draws an archive's name from Python's stream of random numbers, which the seed of
        # the run makes the same in each attempt: in one folder a later archive would replace an
        # earlier one.
        archives = opening.run_dir / self._dir / secrets.token_hex(4)
        if self._offline:
            archives.mkdir(parents=True)
        config = self._api.ExperimentConfig(
            name=opening.name,
            tags=self._tags,
            offline_directory=str(archives),
            **{**quiet, **self._settings},
        )
        key = opening.id or secrets.token_hex(16)
        self._service = experiment = self._api.start(
            workspace=self._workspace,
            project=opening.project,
            experiment_key=key,
            mode="get_or_create",
            online=not self._offline,
            experiment_config=config,
        )
        if not experiment.alive:
            raise LoopkitError("comet_ml did not open the experiment; what it said stands above")
        experiment.log_parameters(flat(opening.hparams))
        return str(experiment.get_key())

    def _send(self, rows: list[Row]) -> None:
        for values, step in rows:
            self._service.log_metrics(values, step=step)

    def _send_array(self, name: str, array: Any, step: int) -> None:
        if array.ndim == 1 and np.isfinite(array).any():
            self._service.log_histogram_3d(array[np.isfinite(array)].tolist(), name=name, step=step)
        elif (
            array.ndim == 2 and array.shape[0] == array.shape[1] and (array == np.rint(array)).all()
        ):
            file = f"{name.replace('/', '-')}-{step:08d}.json"
            counts = array.astype(np.int64).tolist()
            self._service.log_confusion_matrix(matrix=counts, title=name, step=step, file_name=file)
        else:
            self._service.log_asset_data(
                {"values": plain(array)}, name=f"{name}-{step:08d}.json", step=step
            )

    def _stop(self, status: str) -> None:
        self._service.log_other("status", status)
        self._service.end()

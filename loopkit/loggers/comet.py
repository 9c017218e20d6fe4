"""CometLogger: a Comet experiment, online or in an archive for ``comet upload``."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopkit.errors import LoopkitError
from loopkit.keywords import checks_keywords
from loopkit.loggers.media import Media
from loopkit.loggers.remote import RemoteLogger, Row, RunInfo, wav_file
from loopkit.loggers.serialize import flatten, jsonable


@checks_keywords
class CometLogger(RemoteLogger):
    """Log to Comet: scalars, hyperparameters and arrays.

    A 1-D array is logged as a histogram, a square matrix of whole numbers as a confusion matrix,
    and any other array as a JSON asset.

    Examples:
        >>> Fit(loggers=[CometLogger(project="digits")]).run(task)

    Args:
        project: as of ``RemoteLogger``; its variable is $COMET_PROJECT_NAME.
        name: as of ``RemoteLogger``.
        timeout: as of ``RemoteLogger``.
        workspace: None for $COMET_WORKSPACE, or else the account's default.
        tags: of the experiment.
        offline: write archives instead, for ``comet upload``.
        dir: the folder of the archives, absolute or within the run directory. Each attempt gets a
            folder in it.
        settings: other arguments of ``comet_ml.ExperimentConfig``.
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
        self._workspace = workspace
        self._tags = list(tags)
        self._offline = offline
        self._dir = Path(dir)
        self._settings = settings

    def _start(self, info: RunInfo) -> str:
        # comet_ml would detect metrics and parameters that loopkit logs already.
        defaults = {
            "auto_metric_logging": False,
            "auto_param_logging": False,
            "parse_args": False,
            "display_summary_level": 0,
        }
        # comet_ml draws an archive's name from Python's random numbers, which the run's seed makes
        # the same in each attempt: in one folder, a later archive would replace an earlier one.
        archives = info.run_dir / self._dir / secrets.token_hex(4)
        if self._offline:
            archives.mkdir(parents=True)
        config = self._api.ExperimentConfig(
            name=info.name,
            tags=self._tags,
            offline_directory=str(archives),
            **{**defaults, **self._settings},
        )
        key = info.id or secrets.token_hex(16)
        self._service = experiment = self._api.start(
            workspace=self._workspace,
            project=info.project,
            experiment_key=key,
            mode="get_or_create",
            online=not self._offline,
            experiment_config=config,
        )
        if not experiment.alive:
            raise LoopkitError("comet_ml did not open the experiment; see its messages above")
        experiment.log_parameters(flatten(info.hparams))
        return str(experiment.get_key())

    def _send(self, rows: list[Row]) -> None:
        for values, step in rows:
            self._service.log_metrics(values, step=step)

    def _send_array(self, name: str, array: Any, step: int) -> bool:
        square = array.ndim == 2 and array.shape[0] == array.shape[1]
        if array.ndim == 1 and np.isfinite(array).any():
            self._service.log_histogram_3d(array[np.isfinite(array)].tolist(), name=name, step=step)
        elif square and (array == np.rint(array)).all():
            file = f"{name.replace('/', '-')}-{step:08d}.json"
            counts = array.astype(np.int64).tolist()
            self._service.log_confusion_matrix(matrix=counts, title=name, step=step, file_name=file)
        else:
            self._service.log_asset_data(
                {"values": jsonable(array)}, name=f"{name}-{step:08d}.json", step=step
            )

        return True

    def _send_media(self, media: Media, step: int) -> None:
        service, name = self._service, media.name
        if media.kind == "image":
            service.log_image(media.value, name=name, step=step)
        elif media.kind == "text":
            service.log_text(media.value, step=step, metadata={"name": name})
        elif media.kind == "histogram":
            service.log_histogram_3d(media.value.tolist(), name=name, step=step)
        else:
            with wav_file(media) as path:
                # It reads the file later, unless it copies it now.
                service.log_audio(
                    path, file_name=f"{name}-{step:08d}.wav", step=step, copy_to_tmp=True
                )

    def _stop(self, status: str) -> None:
        self._service.log_other("status", status)
        self._service.end()

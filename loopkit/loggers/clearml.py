"""ClearMLLogger: a ClearML task, online or in a session folder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from loopkit.keywords import checks_keywords
from loopkit.loggers.media import Media, wav
from loopkit.loggers.remote import RemoteLogger, Row, RunInfo
from loopkit.loggers.serialize import flatten, to_float

_BINS = 30


@checks_keywords
class ClearMLLogger(RemoteLogger):
    """Log to ClearML: scalars, hyperparameters, 2-D arrays as matrices, 1-D arrays as bars.

    "train/loss" is the series "loss" of the plot "train". ClearML's own detection of arguments,
    frameworks and printed lines is off, unless ``settings`` turn it on.

    Examples:
        >>> Fit(loggers=[ClearMLLogger(project="digits")]).run(task)

    Args:
        project: as of ``RemoteLogger``.
        name: as of ``RemoteLogger``.
        timeout: as of ``RemoteLogger``.
        tags: of the task.
        offline: write a session into ClearML's cache ($CLEARML_CACHE_DIR) instead, for
            ``clearml.Task.import_offline_session``. ClearML stays offline in this process.
        settings: other arguments of ``clearml.Task.init``.
    """

    name = package = extra = "clearml"

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        *,
        tags: Sequence[str] = (),
        offline: bool = False,
        timeout: float = 60.0,
        **settings: Any,
    ) -> None:
        super().__init__(project, name, timeout)
        self._tags = list(tags)
        self._offline = offline
        self._settings = settings

    def _start(self, info: RunInfo) -> str:
        defaults = {
            "auto_connect_arg_parser": False,
            "auto_connect_frameworks": False,
            "auto_connect_streams": False,
            "auto_resource_monitoring": False,
        }
        if self._offline:
            self._api.Task.set_offline(offline_mode=True)
        # By default ClearML sends reports from a fork of this process. The fork, made in a thread,
        # keeps files open that other threads have, and close() may wait for ever for the git
        # that ClearML calls meanwhile.
        self._api.Task._report_subprocess_enabled = False
        self._service = task = self._api.Task.init(
            project_name=info.project,
            task_name=info.name,
            tags=self._tags,
            reuse_last_task_id=False,
            continue_last_task=info.id or False,
            **{**defaults, **self._settings},
        )
        # Without this, the steps of a resumed task would count from its last one.
        task.set_initial_iteration(0)
        task.set_parameters(flatten(info.hparams))
        return str(task.id)

    def _send(self, rows: list[Row]) -> None:
        plots = self._service.get_logger()
        for values, step in rows:
            for name, value in values.items():
                plots.report_scalar(*_parts(name), to_float(value), step)

    def _send_array(self, name: str, array: Any, step: int) -> bool:
        plots = self._service.get_logger()
        if array.ndim == 1:
            plots.report_histogram(*_parts(name), values=np.nan_to_num(array), iteration=step)
        elif array.ndim == 2:
            plots.report_confusion_matrix(*_parts(name), matrix=array, iteration=step)

        return array.ndim in (1, 2)

    def _send_media(self, media: Media, step: int) -> None:
        plots, parts = self._service.get_logger(), _parts(media.name)
        if media.kind == "image":
            plots.report_image(*parts, iteration=step, image=media.value)
        elif media.kind == "histogram":
            counts, edges = np.histogram(media.value, bins=_BINS)
            labels = [f"{edge:.4g}" for edge in edges[:-1]]
            plots.report_histogram(*parts, values=counts, iteration=step, xlabels=labels)
        elif media.kind == "text":
            text = io.BytesIO(media.value.encode("utf-8"))
            plots.report_media(*parts, iteration=step, stream=text, file_extension=".txt")
        else:
            sound = io.BytesIO(wav(media))
            plots.report_media(*parts, iteration=step, stream=sound, file_extension=".wav")

    def _stop(self, status: str) -> None:
        if status == "failed":
            self._service.mark_failed(status_message="the run ended by an exception")
        elif status == "interrupted":
            self._service.mark_stopped(status_message="the run was interrupted by a signal")
        # An offline session is packed by close(), with what has been written by then.
        self._service.flush(wait_for_uploads=True)
        self._service.close()


def _parts(name: str) -> tuple[str, str]:
    """Return the plot and the series of a name."""
    title, _, series = name.rpartition("/")
    return title or name, series

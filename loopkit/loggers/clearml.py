"""ClearMLLogger: a ClearML task, online or into a session folder for
``Task.import_offline_session``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loopkit.keywords import checks_keywords
from loopkit.loggers.remote import Opening, RemoteLogger, Row
from loopkit.loggers.serialize import flat, number


@checks_keywords
class ClearMLLogger(RemoteLogger):
    """Scalars by iteration, hyperparameters by section, 2-D arrays as matrices, 1-D ones as bars.

    "train/loss" is the series "loss" of the plot "train". What ClearML would find by itself
    (arguments, frameworks, printed lines) is left alone unless ``settings`` turn it on.

    Args:
        project, name, timeout: as ``RemoteLogger``.
        tags: of the task.
        offline: write a session alone, in ClearML's own cache ($CLEARML_CACHE_DIR); the process
            stays offline for ClearML.
        settings: everything else that ``clearml.Task.init`` takes.
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
        self._tags, self._offline, self._settings = list(tags), offline, settings

    def _start(self, opening: Opening) -> str:
        alone = {
            "auto_connect_arg_parser": False,
            "auto_connect_frameworks": False,
            "auto_connect_streams": False,
            "auto_resource_monitoring": False,
        }
        if self._offline:
            self._api.Task.set_offline(offline_mode=True)
        # By default reports are sent from a fork of this process. Begun in a thread, the fork keeps
        # open what it falls upon, and close() may wait for ever for the git that ClearML calls
        # meanwhile.
        self._api.Task._report_subprocess_enabled = False
        self._service = task = self._api.Task.init(
            project_name=opening.project,
            task_name=opening.name,
            tags=self._tags,
            reuse_last_task_id=False,
            continue_last_task=opening.id or False,
            **{**alone, **self._settings},
        )
        task.set_initial_iteration(
            0
        )  # or the steps of a task that goes on would count from its last one
        task.set_parameters(flat(opening.hparams))
        return str(task.id)

    def _send(self, rows: list[Row]) -> None:
        plots = self._service.get_logger()
        for values, step in rows:
            for name, value in values.items():
                plots.report_scalar(*_parts(name), number(value), step)

    def _send_array(self, name: str, array: Any, step: int) -> None:
        plots = self._service.get_logger()
        if array.ndim == 1:
            plots.report_histogram(*_parts(name), values=np.nan_to_num(array), iteration=step)
        elif array.ndim == 2:
            plots.report_confusion_matrix(*_parts(name), matrix=array, iteration=step)

    def _stop(self, status: str) -> None:
        if status == "failed":
            self._service.mark_failed(status_message="the run ended by an exception")
        elif status == "interrupted":
            self._service.mark_stopped(status_message="the run was interrupted by a signal")
        self._service.close()


def _parts(name: str) -> tuple[str, str]:
    """The plot and the series."""
    title, _, series = name.rpartition("/")
    return title or name, series

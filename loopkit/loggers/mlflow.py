"""MLflowLogger: an MLflow tracking server, database or folder."""

from __future__ import annotations

import os
import posixpath
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopkit.keywords import checks_keywords
from loopkit.loggers.remote import Opening, RemoteLogger, Row
from loopkit.loggers.serialize import flat, number, plain

_LONGEST = 6000  # characters of a parameter
_LONGEST_NAME = 250
_AT_ONCE = {"metrics": 1000, "params": 100}
_MOST_CELLS = 10_000
_STATUS = {"interrupted": "KILLED", "failed": "FAILED"}


@checks_keywords
class MLflowLogger(RemoteLogger):
    """Scalars by step in batches, hyperparameters flat, arrays of up to 10,000 elements as JSON
    artifacts.

    Characters that MLflow refuses in a name become "_". Parameters cannot change there: those of
    the first attempt stay.

    Args:
        project, name, timeout: as ``RemoteLogger``; the project is the experiment.
            $MLFLOW_EXPERIMENT_NAME and $MLFLOW_RUN_NAME.
        tracking_uri: a server ("http://…"), a database ("sqlite:///mlflow.db", which needs all of
            mlflow) or a folder. None takes $MLFLOW_TRACKING_URI or ``mlflow.set_tracking_uri``'s,
            or else a folder ``mlruns`` in the run directory.
        tags: of the run, by name.
        artifacts: where a new experiment keeps artifacts; None leaves it to the server.
    """

    name = package = extra = "mlflow"
    variables = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME")

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        *,
        tracking_uri: str | Path | None = None,
        tags: Mapping[str, str] | None = None,
        artifacts: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        super().__init__(project, name, timeout)
        self._uri, self._tags, self._artifacts = tracking_uri, dict(tags or {}), artifacts

    def _start(self, opening: Opening) -> str:
        from mlflow.entities import Param

        uri = self._uri
        if uri is None and not self._api.is_tracking_uri_set():
            uri = opening.run_dir / "mlruns"
        if uri is not None and "://" not in str(uri):
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # which mlflow asks for since 3.7
            uri = Path(uri).absolute().as_uri()
        self._service = client = self._api.MlflowClient(tracking_uri=uri)
        if opening.id is None:
            run = client.create_run(
                self._experiment(opening.project), run_name=opening.name, tags=self._tags
            )
        else:
            client.update_run(opening.id, status="RUNNING")
            run = client.get_run(opening.id)
        self._id = str(run.info.run_id)
        given = {
            _name(name): str(value)[:_LONGEST] for name, value in flat(opening.hparams).items()
        }
        new = [Param(name, value) for name, value in given.items() if name not in run.data.params]
        self._batches("params", new)
        return self._id

    def _experiment(self, project: str) -> str:
        found = self._service.get_experiment_by_name(project)
        made = (
            found.experiment_id
            if found
            else self._service.create_experiment(project, self._artifacts)
        )
        return str(made)

    def _send(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._batches(
            "metrics",
            [
                Metric(_name(name), number(value), now, step)
                for values, step in rows
                for name, value in values.items()
            ],
        )

    def _batches(self, kind: str, items: list[Any]) -> None:
        size = _AT_ONCE[kind]
        for start in range(0, len(items), size):
            self._service.log_batch(self._id, **{kind: items[start : start + size]})

    def _send_array(self, name: str, array: Any, step: int) -> None:
        if array.size <= _MOST_CELLS:
            content = {"name": name, "step": step, "values": plain(array)}
            self._service.log_dict(self._id, content, f"arrays/{_name(name)}/{step:08d}.json")

    def _stop(self, status: str) -> None:
        self._service.set_terminated(self._id, status=_STATUS.get(status, "FINISHED"))


def _name(name: str) -> str:
    """``name`` as MLflow takes it: plain characters, and a path that says what it is."""
    allowed = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:_LONGEST_NAME].strip("/")
    parts = [
        part if part.strip(".") else part.replace(".", "_") for part in allowed.split("/") if part
    ]
    return posixpath.join(*parts) if parts else "unnamed"

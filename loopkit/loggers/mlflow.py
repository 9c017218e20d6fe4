"""MLflowLogger: an MLflow tracking server, database or folder."""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loopkit.keywords import checks_keywords
from loopkit.loggers.media import Media, png, wav
from loopkit.loggers.remote import RemoteLogger, Row, RunInfo
from loopkit.loggers.serialize import flatten, jsonable, to_float

# MLflow's own limits: characters of a parameter and of a name, items of one request.
_MOST_CHARACTERS = 6000
_LONGEST_NAME = 250
_MOST_ITEMS = {"metrics": 1000, "params": 100}
_MOST_CELLS = 10_000
_BINS = 30
_STATUS = {"interrupted": "KILLED", "failed": "FAILED"}


@checks_keywords
class MLflowLogger(RemoteLogger):
    """Log to MLflow: scalars, hyperparameters, and arrays of up to 10,000 elements as JSON.

    Characters that MLflow refuses in a name become "_". Parameters of a run cannot change in
    MLflow, so a resumed run keeps those of the first attempt.

    Examples:
        >>> Fit(loggers=[MLflowLogger(tracking_uri="http://localhost:5000")]).run(task)

    Args:
        project: MLflow's experiment, as of ``RemoteLogger``; its variable is
            $MLFLOW_EXPERIMENT_NAME.
        name: as of ``RemoteLogger``; its variable is $MLFLOW_RUN_NAME.
        timeout: as of ``RemoteLogger``.
        tracking_uri: a server ("http://…"), a database ("sqlite:///mlflow.db", which needs the
            whole mlflow package) or a folder. None for $MLFLOW_TRACKING_URI or the URI given to
            ``mlflow.set_tracking_uri``, or else a folder ``mlruns`` in the run directory.
        tags: of the run, by name.
        artifacts: the artifact location of a new experiment; None for the server's default.
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
        self._uri = tracking_uri
        self._tags = dict(tags or {})
        self._artifacts = artifacts

    def _start(self, info: RunInfo) -> str:
        from mlflow.entities import Param

        uri = self._uri
        if uri is None and not self._api.is_tracking_uri_set():
            uri = info.run_dir / "mlruns"
        if uri is not None and "://" not in str(uri):
            # mlflow asks for this since 3.7.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(uri).absolute().as_uri()
        self._service = client = self._api.MlflowClient(tracking_uri=uri)
        if info.id is None:
            run = client.create_run(
                self._experiment(info.project), run_name=info.name, tags=self._tags
            )
        else:
            client.update_run(info.id, status="RUNNING")
            run = client.get_run(info.id)
        self._id = str(run.info.run_id)
        given = {
            _name(name): str(value)[:_MOST_CHARACTERS]
            for name, value in flatten(info.hparams).items()
        }
        new = [Param(name, value) for name, value in given.items() if name not in run.data.params]
        self._batches("params", new)
        return self._id

    def _experiment(self, project: str) -> str:
        """Return the id of an experiment, which is made if it does not exist."""
        found = self._service.get_experiment_by_name(project)
        if found:
            return str(found.experiment_id)
        return str(self._service.create_experiment(project, self._artifacts))

    def _send(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(_name(name), to_float(value), now, step)
            for values, step in rows
            for name, value in values.items()
        ]
        self._batches("metrics", metrics)

    def _batches(self, kind: str, items: list[Any]) -> None:
        size = _MOST_ITEMS[kind]
        for start in range(0, len(items), size):
            self._service.log_batch(self._id, **{kind: items[start : start + size]})

    def _send_array(self, name: str, array: Any, step: int) -> bool:
        if array.size > _MOST_CELLS:
            return False
        content = {"name": name, "step": step, "values": jsonable(array)}
        self._service.log_dict(self._id, content, f"arrays/{_name(name)}/{step:08d}.json")
        return True

    def _send_media(self, media: Media, step: int) -> None:
        folder = f"{media.kind}/{_name(media.name)}"
        if media.kind == "text":
            self._service.log_text(self._id, media.value, f"{folder}/{step:08d}.txt")
        elif media.kind == "histogram":
            counts, edges = np.histogram(media.value, bins=_BINS)
            content = {"name": media.name, "step": step, "counts": counts.tolist()}
            content["edges"] = edges.tolist()
            self._service.log_dict(self._id, content, f"{folder}/{step:08d}.json")
        else:
            image = media.kind == "image"
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / f"{step:08d}{'.png' if image else '.wav'}"
                path.write_bytes(png(media.value) if image else wav(media))
                self._service.log_artifact(self._id, str(path), folder)

    def _stop(self, status: str) -> None:
        self._service.set_terminated(self._id, status=_STATUS.get(status, "FINISHED"))


def _name(name: str) -> str:
    """Return ``name`` with the characters that MLflow accepts, as a path without empty parts."""
    allowed = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)[:_LONGEST_NAME].strip("/")
    parts = [
        part if part.strip(".") else part.replace(".", "_") for part in allowed.split("/") if part
    ]
    return posixpath.join(*parts) if parts else "unnamed"

"""WandbLogger: a run of Weights & Biases, online or in files for ``wandb sync``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopkit.keywords import checks_keywords
from loopkit.loggers.media import Media
from loopkit.loggers.remote import RemoteLogger, Row, RunInfo, to_media, wav_file


@checks_keywords
class WandbLogger(RemoteLogger):
    """Log to Weights & Biases: scalars, the config, 1-D arrays as histograms, 2-D ones as tables.

    Tables have up to 10,000 cells. The x-axis of all charts is the value "step", so values that you
    log yourself need no step. If ``wandb.init`` was called before ``Fit.run`` (in a sweep, for
    example), that run is used, and left open.

    Examples:
        >>> Fit(loggers=[WandbLogger(project="digits", tags=["baseline"])]).run(task)

    Args:
        project: as of ``RemoteLogger``; its variable is $WANDB_PROJECT.
        name: as of ``RemoteLogger``; its variable is $WANDB_NAME.
        timeout: as of ``RemoteLogger``.
        entity: who owns the run, as of ``wandb.init``.
        group: of the run, as of ``wandb.init``.
        job_type: of the run, as of ``wandb.init``.
        notes: on the run, as of ``wandb.init``.
        tags: of the run, as of ``wandb.init``.
        offline: write files instead, for ``wandb sync``; $WANDB_MODE=offline does the same.
        dir: the parent of W&B's folder ``wandb/``, absolute or within the run directory.
        settings: other arguments of ``wandb.init``.
    """

    name = package = extra = "wandb"
    variables = ("WANDB_PROJECT", "WANDB_NAME")

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        *,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        notes: str | None = None,
        tags: Sequence[str] = (),
        offline: bool = False,
        dir: str | Path = ".",
        timeout: float = 60.0,
        **settings: Any,
    ) -> None:
        super().__init__(project, name, timeout)
        self._dir = Path(dir)
        self._owned = True
        self._settings = {
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "notes": notes,
            "tags": list(tags),
            "mode": "offline" if offline else None,
            **settings,
        }

    def _start(self, info: RunInfo) -> str:
        run = self._api.run
        self._owned = run is None
        if run is not None:
            run.config.update(info.hparams, allow_val_change=True)
        else:
            folder = info.run_dir / self._dir
            folder.mkdir(parents=True, exist_ok=True)
            run = self._api.init(
                project=info.project,
                name=info.name,
                id=info.id,
                resume="allow",
                config=info.hparams,
                dir=str(folder),
                **self._settings,
            )
        # W&B drops a row whose own step is lower than that of an earlier row, such as one that the
        # user logged. A value "step" as the x-axis of all others has no such order.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step", step_sync=True)
        self._service = run
        return str(run.id)

    def _send(self, rows: list[Row]) -> None:
        for values, step in rows:
            self._service.log({**values, "step": step})

    def _send_array(self, name: str, array: Any, step: int) -> bool:
        media = to_media(self._api, array)
        if media is not None:
            self._service.log({name: media, "step": step})
        return media is not None

    def _send_media(self, media: Media, step: int) -> None:
        if media.kind == "audio":
            with wav_file(media) as path:
                self._service.log({media.name: self._api.Audio(path), "step": step})
        else:
            made = {
                "image": self._api.Image,
                "histogram": self._api.Histogram,
                "text": lambda text: self._api.Table(columns=["text"], data=[[text]]),
            }[media.kind](media.value)
            self._service.log({media.name: made, "step": step})

    def _stop(self, status: str) -> None:
        self._service.summary["status"] = status
        if self._owned:
            self._service.finish(exit_code=0 if status in ("finished", "stopped") else 1)

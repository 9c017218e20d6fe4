"""WandbLogger: Weights & Biases, online or into files for ``wandb sync``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopkit.keywords import checks_keywords
from loopkit.loggers.remote import Opening, RemoteLogger, Row, drawn


@checks_keywords
class WandbLogger(RemoteLogger):
    """Scalars by step, the config, 1-D arrays as histograms, 2-D ones (up to 10,000 cells) as
    tables.

    Everything is drawn over the value "step", so that what you log beside needs no step, and
    displaces nothing. A run that you opened yourself (``wandb.init`` before ``Fit.run``, or a
    sweep) is taken, and left open.

    Args:
        project, name, timeout: as ``RemoteLogger``; $WANDB_PROJECT and $WANDB_NAME.
        entity, group, job_type, notes, tags: as ``wandb.init`` takes them.
        offline: write files alone, to be sent by ``wandb sync``; $WANDB_MODE may say so too.
        dir: where W&B's folder ``wandb/`` goes, absolute or within the run directory.
        settings: everything else that ``wandb.init`` takes.
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
        self._dir, self._owned = Path(dir), True
        self._settings = {
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "notes": notes,
            "tags": list(tags),
            "mode": "offline" if offline else None,
            **settings,
        }

    def _start(self, opening: Opening) -> str:
        run = self._api.run
        self._owned = run is None
        if run is not None:
            run.config.update(opening.hparams, allow_val_change=True)
        else:
            folder = opening.run_dir / self._dir
            folder.mkdir(parents=True, exist_ok=True)
            run = self._api.init(
                project=opening.project,
                name=opening.name,
                id=opening.id,
                resume="allow",
                config=opening.hparams,
                dir=str(folder),
                **self._settings,
            )
        # Given as W&B's own step, a row would be dropped after any other with a higher one, such as
        # what the user logs beside. As a value that all others are drawn over, it is free of that.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step", step_sync=True)
        self._service = run
        return str(run.id)

    def _send(self, rows: list[Row]) -> None:
        for values, step in rows:
            self._service.log({**values, "step": step})

    def _send_array(self, name: str, array: Any, step: int) -> None:
        found = drawn(self._api, array)
        if found is not None:
            self._service.log({name: found, "step": step})

    def _stop(self, status: str) -> None:
        self._service.summary["status"] = status
        if self._owned:
            self._service.finish(exit_code=0 if status in ("finished", "stopped") else 1)

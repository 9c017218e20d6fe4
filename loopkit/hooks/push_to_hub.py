"""PushToHub: the model to a repository of the Hugging Face Hub, in the background."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopkit.checkpoint.format import parse_name
from loopkit.checkpoint.tools import export
from loopkit.errors import LoopkitWarning, OptionError, missing_extra, nearest
from loopkit.events import Hook
from loopkit.hooks.model_card import MARK, model_card
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run

WHEN = ("end", "every_save", "checkpoint", "all_checkpoints")
_BESIDE = ("hparams.json", "metrics.jsonl")


@dataclass
class _Push:
    """One upload: a checkpoint's files, linked so that they stay, and the page that goes with them."""

    name: str
    step: int
    folder: Path
    card: str


@checks_keywords
class PushToHub(Hook):
    """Uploads the weights and what tells of them, while training goes on.

    A commit holds ``model.safetensors`` and ``loopkit.json`` (the task's name and arguments),
    ``hparams.json``, ``metrics.jsonl`` and a model card; a README.md that somebody else wrote is
    left alone. At the end it is the best checkpoint's weights under ``Checkpoint(load_best=True)``,
    else the last one's. Of saves that follow each other faster than they upload, the newest is
    sent. A failed upload never ends the run: all of them are told of once, at its end. An
    interrupted run sends nothing more, since it is to go on.

    Args:
        repo: "user/name"; made if it is not there. The token is huggingface_hub's own: $HF_TOKEN,
            or ``hf auth login``.
        when: "end"; "every_save": after each checkpoint too; "checkpoint": with the newest
            checkpoint whole, in ``last-checkpoint/``, to be resumed from; "all_checkpoints": with
            each, in ``checkpoints/``.
        private: for a new repository; None leaves it to the account.
        revision: a branch; made if it is not there. None is the main one.
        card: write the model card.
        patience: how many seconds the end of the run waits for uploads.

    Attributes:
        pushed: the steps that were uploaded.

    Raises:
        OptionError: ``when`` is not known, or ``repo`` is no name.
    """

    def __init__(
        self,
        repo: str,
        when: str = "end",
        *,
        private: bool | None = None,
        revision: str | None = None,
        card: bool = True,
        patience: float = 3600.0,
    ) -> None:
        if when not in WHEN:
            raise OptionError(
                f"PushToHub(when={when!r}): give one of "
                f"{', '.join(WHEN)}.{nearest(str(when), WHEN)}"
            )
        if not isinstance(repo, str) or not repo or repo.count("/") > 1:
            raise OptionError(
                f"PushToHub(repo={repo!r}): give the name of a repository, such as 'me/digits'"
            )
        self._repo, self._when, self._private, self._revision = repo, when, private, revision
        self._card, self._patience = card, patience
        self.pushed: list[int] = []
        self._begin()

    def _begin(self) -> None:
        self.pushed.clear()
        self._failed: list[str] = []
        self._waiting: list[_Push] = []
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._staging: Path | None = None

    def on_setup(self, run: Run) -> None:
        """Refuse to start where nothing could be uploaded.

        Raises:
            MissingExtraError: huggingface_hub is not installed.
            OptionError: the run saves no checkpoint.
        """
        if find_spec("huggingface_hub") is None:
            raise missing_extra("huggingface_hub", "hf", "PushToHub")
        if run.loader is not None and run.checkpointer is None:
            raise OptionError(
                "PushToHub uploads what is saved, and this run saves nothing: leave "
                "checkpoint=False out"
            )
        self._begin()

    def on_save(self, run: Run, path: Path) -> None:
        """Upload a checkpoint, or take it in the place of one that waits."""
        if run.strategy.rank == 0 and self._when != "end":
            self._submit(run, path, _step(path))

    def on_fit_end(self, run: Run) -> None:
        """Upload the result, wait for it, and tell of what failed."""
        if (
            run.strategy.rank != 0
            or run.checkpointer is None
            or run.checkpointer.newest is None
            or run.outcome.status == "interrupted"
        ):
            self._drop()
            return
        path = run.record.best.get("checkpoint") if run.checkpointer.settings.load_best else None
        path = path or run.checkpointer.newest
        self._submit(run, path, _step(path))
        thread = self._thread
        if thread is not None:
            thread.join(self._patience)
            if thread.is_alive():
                self._failed.append(f"an upload was not done after {self._patience:g} s")
        self._drop()
        if self._failed:
            count = len(self._failed)
            warnings.warn(
                f"PushToHub: of {count + len(self.pushed)} uploads to {self._repo}, {count} "
                f"failed, the last "
                f"by {self._failed[-1]}. Everything is in {run.run_dir}; to upload it yourself: "
                "result.export(dir), then huggingface_hub.upload_folder",
                LoopkitWarning,
                stacklevel=2,
            )

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Upload nothing more."""
        self._drop()

    def _drop(self) -> None:
        with self._lock:
            self._waiting.clear()
        if self._staging is not None and (self._thread is None or not self._thread.is_alive()):
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _submit(self, run: Run, path: Path, step: int) -> None:
        assert run.run_dir is not None
        try:
            if self._staging is None:
                self._staging = Path(tempfile.mkdtemp(prefix=".push-", dir=run.run_dir))
            folder = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=self._staging))
            shutil.copytree(path, folder / path.name, copy_function=_link)
            for name in _BESIDE:
                with suppress(FileNotFoundError):
                    shutil.copy(run.run_dir / name, folder / name)
        except OSError as error:
            self._failed.append(f"{type(error).__name__}: {error}")
            return
        metrics = {
            name: value
            for name, value in run.metrics.items()
            if name.startswith(("eval/", "train/loss"))
        }
        if (
            run.record.best.get("step") == step != run.progress.step
        ):  # an earlier one is uploaded, with what is known of it
            metrics = {run.record.best["metric"]: run.record.best["value"]}
        place = {
            "checkpoint": "last-checkpoint",
            "all_checkpoints": f"checkpoints/{path.name}",
        }.get(self._when)
        push = _Push(path.name, step, folder, model_card(run, self._repo, step, metrics, place))
        with self._lock:
            if self._when != "all_checkpoints":
                self._waiting.clear()
            self._waiting.append(push)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="loopkit-push", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                push = self._waiting.pop(0)
            try:
                with _no_bars():
                    self._push(push)
                self.pushed.append(push.step)
            except Exception as error:
                self._failed.append(f"{type(error).__name__}: {error}")
            shutil.rmtree(push.folder, ignore_errors=True)

    def _push(self, push: _Push) -> None:
        from huggingface_hub import HfApi

        api, checkpoint = HfApi(library_name="loopkit"), push.folder / push.name
        repo = api.create_repo(self._repo, private=self._private, exist_ok=True).repo_id
        if self._revision is not None:
            api.create_branch(repo, branch=self._revision, exist_ok=True)
        out = export(checkpoint, push.folder / "out")
        for name in _BESIDE:
            if (push.folder / name).exists():
                (push.folder / name).rename(out / name)
        if self._when == "checkpoint":
            checkpoint.rename(out / "last-checkpoint")
        elif self._when == "all_checkpoints":
            (out / "checkpoints").mkdir()
            checkpoint.rename(out / "checkpoints" / push.name)
        if self._card and self._card_is_ours(api, repo, push.folder):
            (out / "README.md").write_text(push.card, encoding="utf-8")
        old = "last-checkpoint/*" if self._when == "checkpoint" else None
        api.upload_folder(
            repo_id=repo,
            folder_path=out,
            revision=self._revision,
            delete_patterns=old,
            commit_message=f"{push.step} steps",
        )

    def _card_is_ours(self, api: Any, repo: str, folder: Path) -> bool:
        if not api.file_exists(repo, "README.md", revision=self._revision):
            return True
        found = api.hf_hub_download(
            repo, "README.md", revision=self._revision, local_dir=folder / "theirs"
        )
        return MARK in Path(found).read_text(encoding="utf-8")


def _step(path: Path) -> int:
    """The step in a checkpoint's name."""
    found = parse_name(path.name)
    assert found is not None
    return found[0]


def _link(source: str, target: str) -> None:
    """A second name for a file, which outlives the first; a copy where the file system has no such
    thing.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Inside, huggingface_hub draws no bars: there is one already."""
    from huggingface_hub import utils

    bars: Any = utils
    already = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if not already:
            bars.enable_progress_bars()

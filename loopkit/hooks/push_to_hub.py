"""PushToHub: upload the model to a repository of the Hugging Face Hub, in the background."""

from __future__ import annotations

import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopkit.checkpoint.format import parse_name
from loopkit.checkpoint.tools import export_model
from loopkit.checks import checked_choice
from loopkit.errors import LoopkitWarning, OptionError, missing_extra
from loopkit.events import Hook
from loopkit.files import link_tree
from loopkit.hooks.model_card import MARK, model_card
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run

WHEN = ("end", "every_save", "checkpoint", "all_checkpoints")
_EXTRA_FILES = ("hparams.json", "metrics.jsonl")


@dataclass
class _Upload:
    """A checkpoint to upload, hard-linked so that its files stay, and its model card."""

    name: str
    step: int
    folder: Path
    card: str


@checks_keywords
class PushToHub(Hook):
    """Upload the weights with a model card to the Hugging Face Hub, while training continues.

    A commit holds ``model.safetensors``, ``loopkit.json`` (the task's name and arguments),
    ``hparams.json``, ``metrics.jsonl`` and a model card. A README.md that somebody else wrote is
    kept. The weights uploaded at the end are those of the last checkpoint, or of the best one under
    ``Checkpoint(load_best=True)``. If checkpoints are saved faster than they are uploaded, only the
    newest is uploaded. A failed upload does not end the run: one warning at the end counts them.
    A run that a signal interrupts uploads nothing more, because it is to be resumed.

    Examples:
        >>> Fit(hooks=[PushToHub("me/digits", when="every_save")]).run(task)

    Args:
        repo: "user/name"; made if it does not exist. The token is that of huggingface_hub: $HF_TOKEN
            or ``hf auth login``.
        when: "end"; "every_save": also after each checkpoint; "checkpoint": also with the whole
            newest checkpoint in ``last-checkpoint/``, to resume from; "all_checkpoints": with each
            of them in ``checkpoints/``.
        private: of a new repository; None for the default of the account.
        revision: a branch; made if it does not exist. None for the main branch.
        card: write the model card.
        timeout: how many seconds the end of the run waits for uploads.

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
        timeout: float = 3600.0,
    ) -> None:
        if not isinstance(repo, str) or not repo or repo.count("/") > 1:
            raise OptionError(
                f"PushToHub(repo={repo!r}): give the name of a repository, such as 'me/digits'"
            )
        self._repo = repo
        self._when = checked_choice(when, "PushToHub(when=)", WHEN)
        self._private = private
        self._revision = revision
        self._card = card
        self._timeout = timeout
        self.pushed: list[int] = []
        self._begin()

    def _begin(self) -> None:
        self.pushed.clear()
        self._errors: list[str] = []
        self._queue: list[_Upload] = []
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._staging: Path | None = None

    def on_setup(self, run: Run) -> None:
        """Check that something can be uploaded.

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
        """Upload a checkpoint; it replaces one that waits to be uploaded."""
        if run.strategy.rank == 0 and self._when != "end":
            self._submit(run, path)

    def on_fit_end(self, run: Run) -> None:
        """Upload the result, wait for the upload, and warn of uploads that failed."""
        checkpointer = run.checkpointer
        interrupted = run.outcome.status == "interrupted"
        if (
            run.strategy.rank != 0
            or checkpointer is None
            or checkpointer.newest is None
            or interrupted
        ):
            self._drop()
            return
        best = run.record.best.get("checkpoint") if checkpointer.settings.load_best else None
        self._submit(run, best or checkpointer.newest)
        thread = self._thread
        if thread is not None:
            thread.join(self._timeout)
            if thread.is_alive():
                self._errors.append(f"an upload was not done after {self._timeout:g} s")
        self._drop()
        if self._errors:
            self._warn(run)

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Upload nothing more."""
        self._drop()

    def _warn(self, run: Run) -> None:
        count = len(self._errors)
        warnings.warn(
            f"PushToHub: of {count + len(self.pushed)} uploads to {self._repo}, {count} failed, "
            f"the last by {self._errors[-1]}. Everything is in {run.run_dir}; to upload it "
            "yourself: result.export(dir), then huggingface_hub.upload_folder",
            LoopkitWarning,
            stacklevel=3,
        )

    def _drop(self) -> None:
        """Forget the uploads that wait, and remove the linked files if no upload is in flight."""
        with self._lock:
            self._queue.clear()
        if self._staging is not None and (self._thread is None or not self._thread.is_alive()):
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _submit(self, run: Run, path: Path) -> None:
        """Link a checkpoint's files, and let the thread upload them."""
        assert run.run_dir is not None
        try:
            if self._staging is None:
                self._staging = Path(tempfile.mkdtemp(prefix=".push-", dir=run.run_dir))
            folder = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=self._staging))
            link_tree(path, folder / path.name)
            for name in _EXTRA_FILES:
                with suppress(FileNotFoundError):
                    shutil.copy(run.run_dir / name, folder / name)
        except OSError as error:
            self._errors.append(f"{type(error).__name__}: {error}")
            return
        step = _step(path)
        subfolders = {
            "checkpoint": "last-checkpoint",
            "all_checkpoints": f"checkpoints/{path.name}",
        }
        card = model_card(run, self._repo, step, _metrics(run, step), subfolders.get(self._when))
        with self._lock:
            if self._when != "all_checkpoints":
                self._queue.clear()
            self._queue.append(_Upload(path.name, step, folder, card))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="loopkit-push", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                upload = self._queue.pop(0)
            try:
                with _no_progress_bars():
                    self._push(upload)
                self.pushed.append(upload.step)
            except Exception as error:
                self._errors.append(f"{type(error).__name__}: {error}")
            shutil.rmtree(upload.folder, ignore_errors=True)

    def _push(self, upload: _Upload) -> None:
        from huggingface_hub import HfApi

        api, checkpoint = HfApi(library_name="loopkit"), upload.folder / upload.name
        repo = api.create_repo(self._repo, private=self._private, exist_ok=True).repo_id
        if self._revision is not None:
            api.create_branch(repo, branch=self._revision, exist_ok=True)
        out = export_model(checkpoint, upload.folder / "out")
        for name in _EXTRA_FILES:
            if (upload.folder / name).exists():
                (upload.folder / name).rename(out / name)
        if self._when == "checkpoint":
            checkpoint.rename(out / "last-checkpoint")
        elif self._when == "all_checkpoints":
            (out / "checkpoints").mkdir()
            checkpoint.rename(out / "checkpoints" / upload.name)
        if self._card and self._owns_card(api, repo, upload.folder):
            (out / "README.md").write_text(upload.card, encoding="utf-8")
        api.upload_folder(
            repo_id=repo,
            folder_path=out,
            revision=self._revision,
            delete_patterns="last-checkpoint/*" if self._when == "checkpoint" else None,
            commit_message=f"{upload.step} steps",
        )

    def _owns_card(self, api: Any, repo: str, folder: Path) -> bool:
        """Return whether the repository has no README.md, or one that loopkit wrote."""
        if not api.file_exists(repo, "README.md", revision=self._revision):
            return True
        found = api.hf_hub_download(
            repo, "README.md", revision=self._revision, local_dir=folder / "theirs"
        )
        return MARK in Path(found).read_text(encoding="utf-8")


def _metrics(run: Run, step: int) -> Mapping[str, float]:
    """Return the metrics of the weights of ``step``, as far as they are known."""
    best = run.record.best
    if best.get("step") == step != run.progress.step:
        return {best["metric"]: best["value"]}
    return {
        name: value
        for name, value in run.metrics.items()
        if name.startswith(("eval/", "train/loss"))
    }


def _step(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    found = parse_name(path.name)
    assert found is not None
    return found[0]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Disable the progress bars of huggingface_hub within the block: the run has its own."""
    from huggingface_hub import utils

    bars: Any = utils
    already = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if not already:
            bars.enable_progress_bars()

"""The ``--checkpoint PATH`` of evaluate and predict: weights, and the task's arguments as they
were.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loopkit.checkpoint import load_checkpoint
from loopkit.cli.args.request import Request
from loopkit.cli.args.tokens import Word, take_values
from loopkit.distributed.environment import is_rank_zero
from loopkit.errors import OptionError

ABOUT = {
    "--checkpoint PATH": "the weights: a checkpoint, or a run directory for its newest good one. The task is "
    "built with the arguments it was trained with, unless others are typed"
}


def take_checkpoint(request: Request, words: list[Word]) -> Path | None:
    """Find the checkpoint that is to be used, and take over the task's arguments from it.

    Raises:
        OptionError: several are given.
        CheckpointError: it is not there, or cannot be trusted.
    """
    paths = take_values(words, "checkpoint")
    if len(paths) > 1:
        raise OptionError(
            "--checkpoint is given several times: name one checkpoint or run directory"
        )
    if not paths:
        if is_rank_zero():
            print(
                f"loopkit: no --checkpoint: {request.task.__name__} has the weights it starts with",
                file=sys.stderr,
            )
        return None
    path, snapshot = load_checkpoint(Path(paths[0]), option="--checkpoint ")
    about = snapshot.state.get("task", {})
    request.saved = about.get("hparams", {})
    lost = [name for name in about.get("unsaved", []) if not _typed(request, name)]
    if lost and is_rank_zero():
        print(
            f"loopkit: {path} could not keep {', '.join(lost)}: the code's default is used",
            file=sys.stderr,
        )
    return path


def _typed(request: Request, name: str) -> bool:
    return any(word.name.removeprefix("task.").partition(".")[0] == name for word in request.words)

"""``loopkit predict``: write a task's predictions as JSON lines, text or NumPy files."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from loopkit.cli.args import saved
from loopkit.cli.args.request import Command, read_request
from loopkit.cli.args.tokens import take_values
from loopkit.cli.evaluate import strict
from loopkit.distributed.environment import is_rank_zero
from loopkit.errors import DiskFullError, OptionError, RunDirError, TaskError, nearest
from loopkit.files import replacing
from loopkit.loops.predict import concatenate_outputs

PREDICT = Command(
    "predict",
    "Write a task's predictions, in the order of its data.",
    {
        **saved.ABOUT,
        "--out FILE": "where to: .jsonl (a line for each sample), .npy (one array), .npz (an array by "
        "name) or .txt (a line for each sample). JSON lines on stdout without it",
    },
    hidden=("checkpoint",),
)


def run(argv: Sequence[str]) -> int:
    """Predict with the target; the exit code."""
    request, words = read_request(PREDICT, argv)
    if request is None:
        return 0
    out = take_values(words, "out")
    if len(out) > 1:
        raise OptionError("--out is given several times: predictions go to one file")
    checkpoint = saved.take_checkpoint(request, words)
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    fit, task = request.build(values)
    if not is_rank_zero():
        fit.predict(task, checkpoint=checkpoint, writer=lambda outputs: None)
        return 0
    with open_sink(Path(out[0]) if out else None) as sink:
        fit.predict(task, checkpoint=checkpoint, writer=sink.write)
    if out:
        print(f"loopkit: {sink.samples} predictions in {out[0]}", file=sys.stderr)
    return 0


class Sink:
    """Takes the predictions of one batch after the other. ``samples`` counts what it got."""

    samples = 0

    def write(self, outputs: Any) -> None:
        """The predictions of one batch."""

    def finish(self) -> None:
        """There are no more."""


class Lines(Sink):
    """A line for each sample: JSON, or plain text."""

    def __init__(self, file: IO[str], *, as_json: bool) -> None:
        self._file = file
        self._as_json = as_json

    def write(self, outputs: Any) -> None:
        """A line for each sample of the batch."""
        for sample in samples(outputs):
            text = (
                json.dumps(strict(sample), ensure_ascii=False) if self._as_json else _text(sample)
            )
            self._file.write(text + "\n")
            self.samples += 1


class Arrays(Sink):
    """All predictions as arrays, first dimension the samples: one, or one by name."""

    def __init__(self, file: IO[bytes], *, named: bool) -> None:
        self._file = file
        self._named = named
        self._parts: list[Any] = []

    def write(self, outputs: Any) -> None:
        """Keep the batch until the end."""
        self._parts.append(outputs)
        self.samples += _count(outputs)

    def finish(self) -> None:
        """Join the batches and write them.

        Raises:
            OptionError: the predictions are named and the file is not, or the other way round.
            TaskError: they are of different shapes.
        """
        joined = concatenate_outputs(self._parts)
        if isinstance(joined, Mapping) is not self._named:
            raise OptionError(
                "predict_step returns a dict: write an .npz or .jsonl file"
                if not self._named
                else "predict_step returns no dict: write an .npy or .jsonl file"
            )
        if self._named:
            arrays: dict[str, Any] = {str(name): _array(part) for name, part in joined.items()}
            np.savez(self._file, **arrays)
        else:
            np.save(self._file, _array(joined))


def samples(outputs: Any) -> Iterator[Any]:
    """The samples of one batch's predictions, as plain values.

    Raises:
        TaskError: there is no first dimension to go by.
    """
    if isinstance(outputs, Tensor):
        if outputs.ndim == 0:
            raise TaskError(
                "predict_step returned a scalar tensor for a batch: return a prediction for each "
                "sample"
            )
        yield from outputs.tolist()
    elif isinstance(outputs, Mapping):
        for row in zip(*(samples(part) for part in outputs.values()), strict=True):
            yield dict(zip(outputs, row))
    elif isinstance(outputs, tuple):
        yield from (list(row) for row in zip(*(samples(part) for part in outputs), strict=True))
    elif isinstance(outputs, (list, np.ndarray)):
        yield from (_plain(sample) for sample in outputs)
    else:
        raise TaskError(
            f"predict_step returned {type(outputs).__name__}: return a tensor, a list with an item "
            f"for "
            "each sample, or a dict or tuple of these"
        )


def _count(outputs: Any) -> int:
    if isinstance(outputs, Mapping):
        return _count(next(iter(outputs.values()))) if outputs else 0
    if isinstance(outputs, tuple):
        return _count(outputs[0]) if outputs else 0
    if isinstance(outputs, (list, np.ndarray)) or (isinstance(outputs, Tensor) and outputs.ndim):
        return len(outputs)
    return sum(1 for _ in samples(outputs))  # which says what is wrong with it


def _plain(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _text(sample: Any) -> str:
    if isinstance(sample, list) and not any(isinstance(item, (list, dict)) for item in sample):
        return " ".join(map(_text, sample))
    if isinstance(sample, (list, dict)):
        raise OptionError(
            "these predictions are nested and make no line of text: write a .jsonl file"
        )
    return str(sample).replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


def _array(joined: Any) -> np.ndarray[Any, Any]:
    if isinstance(joined, Tensor):
        return (joined.float() if joined.dtype == torch.bfloat16 else joined).numpy()
    try:
        found = np.asarray(_plain(joined))
    except ValueError as error:
        raise TaskError(
            "the predictions have different shapes and make no array: write a .jsonl file"
        ) from error
    if found.dtype == object:
        raise TaskError(
            "the predictions are no numbers or strings and make no array: write a .jsonl file"
        )
    return found


@contextmanager
def open_sink(out: Path | None) -> Iterator[Sink]:
    """Where predictions go: a file by its ending, or stdout.

    Raises:
        OptionError: the ending is not known.
        RunDirError: the file cannot be written.
        DiskFullError: there is no room for it.
    """
    if out is None:
        yield Lines(sys.stdout, as_json=True)
        sys.stdout.flush()
        return
    kinds = (".jsonl", ".npy", ".npz", ".txt")
    if out.suffix not in kinds:
        raise OptionError(
            f"--out {out}: the ending says the format, one of {', '.join(kinds)}."
            f"{nearest(out.suffix, kinds)}"
        )
    with replacing(out) as partial, _writing(out, partial) as file:
        sink: Sink = Lines(file, as_json=out.suffix == ".jsonl")
        if out.suffix in (".npy", ".npz"):
            sink = Arrays(file, named=out.suffix == ".npz")
        yield sink
        sink.finish()


@contextmanager
def _writing(out: Path, partial: Path) -> Iterator[Any]:
    text = out.suffix in (".jsonl", ".txt")
    try:
        with open(partial, "w" if text else "wb", encoding="utf-8" if text else None) as file:
            yield file
    except OSError as error:
        if isinstance(error, (DiskFullError, RunDirError)) or error.filename not in (
            None,
            str(partial),
        ):
            raise
        if error.errno == errno.ENOSPC:
            raise DiskFullError(
                f"no room for {out}: free some space, or write it elsewhere"
            ) from error
        if error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.ENOENT,
            errno.ENOTDIR,
            errno.EROFS,
            errno.EISDIR,
        ):
            raise RunDirError(f"--out {out} cannot be written: {error.strerror}") from error
        raise

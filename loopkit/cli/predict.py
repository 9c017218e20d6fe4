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

from loopkit.cli.args.request import CHECKPOINT, Command, read_request
from loopkit.cli.args.tokens import take_value
from loopkit.cli.evaluate import to_json
from loopkit.distributed.environment import is_rank_zero
from loopkit.errors import DiskFullError, OptionError, RunDirError, TaskError, nearest
from loopkit.files import replacing
from loopkit.metrics.outputs import BatchOutput, join_outputs, named_parts

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EISDIR)
KINDS = (".jsonl", ".npy", ".npz", ".txt")
PREDICT = Command(
    "predict",
    "Write a task's predictions, in the order of its data.",
    {
        **CHECKPOINT,
        "--out FILE": "the file: .jsonl (a line for each sample), .npy (one array), .npz (an array "
        "for each name) or .txt (a line for each sample). Without it, JSON lines go to stdout",
    },
    hidden=("checkpoint",),
)


def run(argv: Sequence[str]) -> int:
    """Predict with the target; return the exit code."""
    request = read_request(PREDICT, argv)
    if request is None:
        return 0
    out = take_value(request.tokens, "out")
    checkpoint = request.take_checkpoint()
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    fit, task = request.build(values)
    if not is_rank_zero():
        fit.predict(task, checkpoint=checkpoint, writer=lambda outputs: None)
        return 0
    with open_sink(Path(out) if out else None) as sink:
        fit.predict(task, checkpoint=checkpoint, writer=sink.write)
    if out:
        print(f"loopkit: {sink.samples} predictions in {out}", file=sys.stderr)
    return 0


class Sink:
    """Writes predictions, batch by batch.

    Attributes:
        samples: how many samples were written.
    """

    samples = 0

    def write(self, outputs: Any) -> None:
        """Take the predictions of one batch."""

    def finish(self) -> None:
        """Write what is left; there are no more batches."""


class Lines(Sink):
    """Writes a line for each sample: JSON or plain text."""

    def __init__(self, file: IO[str], *, as_json: bool) -> None:
        self._file = file
        self._as_json = as_json

    def write(self, outputs: Any) -> None:
        """Write a line for each sample of the batch."""
        for sample in samples(outputs):
            if self._as_json:
                line = json.dumps(to_json(sample), ensure_ascii=False)
            else:
                line = _to_text(sample)
            self._file.write(f"{line}\n")
            self.samples += 1


class Arrays(Sink):
    """Writes all predictions at the end, as one array or as an array for each name."""

    def __init__(self, file: IO[bytes], *, named: bool) -> None:
        self._file = file
        self._named = named
        self._parts: list[BatchOutput] = []

    def write(self, outputs: Any) -> None:
        """Keep the predictions of the batch."""
        size = _count(outputs)
        self._parts.append(BatchOutput(outputs, size))
        self.samples += size

    def finish(self) -> None:
        """Concatenate the batches and write them; the first dimension is the samples.

        Raises:
            OptionError: the file holds one array and predict_step returns a dict, or the reverse.
            TaskError: the predictions have different shapes.
        """
        joined = join_outputs(self._parts, "predict_step")
        if not isinstance(joined, tuple):
            joined = named_parts(joined) or joined
        if isinstance(joined, Mapping) and not self._named:
            raise OptionError("predict_step returns a dict: write an .npz or .jsonl file")
        if self._named and not isinstance(joined, Mapping):
            raise OptionError("predict_step returns no dict: write an .npy or .jsonl file")
        if self._named:
            arrays: dict[str, Any] = {str(name): _array(part) for name, part in joined.items()}
            np.savez(self._file, **arrays)
        else:
            np.save(self._file, _array(joined))


def samples(outputs: Any) -> Iterator[Any]:
    """Yield the samples of one batch's predictions as plain values.

    Raises:
        TaskError: the predictions have no first dimension, or parts of them have other lengths.
    """
    parts = list(outputs) if isinstance(outputs, tuple) else named_parts(outputs)
    if isinstance(outputs, Tensor):
        if outputs.ndim == 0:
            raise TaskError(
                "predict_step returned a scalar tensor for a batch: "
                "return a prediction for each sample"
            )
        yield from outputs.tolist()
    elif isinstance(parts, dict):
        for row in _rows(list(parts.values())):
            yield dict(zip(parts, row))
    elif isinstance(parts, list):
        yield from map(list, _rows(parts))
    elif isinstance(outputs, (list, np.ndarray)):
        yield from (_plain(sample) for sample in outputs)
    else:
        raise TaskError(
            f"predict_step returned {type(outputs).__name__}: return a tensor, "
            "a list with an item for each sample, or a dict or tuple of these"
        )


def _rows(parts: list[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the samples of several parts side by side; None stands for a part without samples."""
    columns = [None if part is None else list(samples(part)) for part in parts]
    lengths = {len(column) for column in columns if column is not None}
    if len(lengths) > 1:
        raise TaskError(
            f"predict_step returned parts of {', '.join(map(str, sorted(lengths)))} entries for one "
            "batch: return a prediction for each sample in each part"
        )
    count = lengths.pop() if lengths else 0
    yield from zip(*([None] * count if column is None else column for column in columns))


def _count(outputs: Any) -> int:
    if not isinstance(outputs, tuple) and (parts := named_parts(outputs)) is not None:
        return next((_count(part) for part in parts.values() if part is not None), 0)
    if isinstance(outputs, tuple):
        return _count(outputs[0]) if outputs else 0
    if isinstance(outputs, (list, np.ndarray)) or (isinstance(outputs, Tensor) and outputs.ndim):
        return len(outputs)
    return sum(1 for _ in samples(outputs))  # raises the error for this kind of predictions


def _plain(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _to_text(sample: Any) -> str:
    if isinstance(sample, list) and not any(isinstance(item, (list, dict)) for item in sample):
        return " ".join(map(_to_text, sample))
    if isinstance(sample, (list, dict)):
        raise OptionError(
            "these predictions are nested, and do not fit a line of text: write a .jsonl file"
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
            "the predictions are neither numbers nor strings and make no array: write a .jsonl file"
        )
    return found


@contextmanager
def open_sink(out: Path | None) -> Iterator[Sink]:
    """Open the file for the predictions, which appears when it is complete; None means stdout.

    Raises:
        OptionError: the file's ending is unknown.
        RunDirError: the file cannot be written.
        DiskFullError: the disk has no room for it.
    """
    if out is None:
        yield Lines(sys.stdout, as_json=True)
        sys.stdout.flush()
        return
    if out.suffix not in KINDS:
        kinds = ", ".join(KINDS)
        hint = nearest(out.suffix, KINDS)
        raise OptionError(f"--out {out}: the ending says the format, one of {kinds}.{hint}")
    with replacing(out) as partial, _open(out, partial) as file:
        sink: Sink = Lines(file, as_json=out.suffix == ".jsonl")
        if out.suffix in (".npy", ".npz"):
            sink = Arrays(file, named=out.suffix == ".npz")
        yield sink
        sink.finish()


@contextmanager
def _open(out: Path, partial: Path) -> Iterator[Any]:
    text = out.suffix in (".jsonl", ".txt")
    try:
        with open(partial, "w" if text else "wb", encoding="utf-8" if text else None) as file:
            yield file
    except OSError as error:
        own = error.filename in (None, str(partial))
        if isinstance(error, (DiskFullError, RunDirError)) or not own:
            raise
        if error.errno == errno.ENOSPC:
            raise DiskFullError(
                f"no room for {out}: free some space, or write it elsewhere"
            ) from error
        if error.errno in UNWRITABLE:
            raise RunDirError(f"--out {out} cannot be written: {error.strerror}") from error
        raise

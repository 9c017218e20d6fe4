"""Streams of other libraries: what a resume can rely on, and which divide themselves over the ranks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

from loopkit.errors import LoopkitWarning

# Packages whose data sets read a part of their own on each rank.
_DIVIDING = ("litdata", "streaming")
# What they name a function that does so.
_SPLITTERS = ("split_by_node", "split_by_worker_and_node")


def has_state(part: Any) -> bool:
    """Return whether an object has a state that it can be given back, and that holds all of it.

    A shuffle buffer of Hugging Face's ``datasets`` is in no state, and its samples would be lost.
    The data sets of litdata and mosaicml-streaming leave the position to their own loaders: their
    ``state_dict`` takes it as an argument.
    """
    if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
        return False
    if any(type(each).__name__ == "BufferShuffledExamplesIterable" for each in _inner(part)):
        return False
    try:
        inspect.signature(part.state_dict).bind()
    except TypeError:
        return False
    except ValueError:  # a function of C
        pass
    return True


def divides_itself(data: Any) -> bool:
    """Return whether each rank reads a part of its own of ``data``, which another library made."""
    for part in _parts(data):
        if _library_of(part) in _DIVIDING and hasattr(part, "state_dict"):
            return True
        if getattr(part, "_distributed", None) is not None:  # datasets' split_dataset_by_node
            return True
        if getattr(part, "__name__", "") in _SPLITTERS:
            return True
    return False


def set_next_epoch(part: Any, epoch: int) -> bool:
    """Tell a data set of mosaicml-streaming which pass begins; return whether it is one.

    It counts the passes in memory that the ranks of a machine share, and from 0 after a restart. All
    ranks set the same number before any of them reads on.
    """
    if not (_library_of(part) == "streaming" and hasattr(part, "next_epoch")):
        return False
    part.next_epoch = epoch
    return True


def set_stage_epochs(pipeline: Any, epoch: int) -> bool:
    """Tell the shuffles of a webdataset pipeline which pass begins; return whether it has any."""
    stages = [stage for stage in pipeline if type(stage).__name__ == "detshuffle"]
    for stage in stages:
        stage.epoch = epoch - 1  # it counts on when it begins
    return bool(stages)


def warn_of_inexact(data: Any, what: str) -> None:
    """Warn of a stream that gives other samples, or another order, when it is read again."""
    for part in _parts(data):
        name = type(part).__name__
        reason = ""
        if name == "ResampledShards":
            reason = "resampled=True draws its shards by the clock: leave it out"
        elif getattr(getattr(part, "f", None), "__name__", "") == "_shuffle" and not _is_seeded(
            part
        ):
            reason = (
                "shuffle() without a seed draws by the clock: take "
                ".compose(webdataset.detshuffle(1000, seed=0)), which follows the epoch"
            )
        if reason:
            warnings.warn(
                f"{what} cannot be resumed exactly: {reason}", LoopkitWarning, stacklevel=2
            )


def _library_of(part: Any) -> str:
    return type(part).__module__.partition(".")[0]


def _is_seeded(stage: Any) -> bool:
    """Return whether a ``shuffle`` of webdataset has a seed, its fourth argument."""
    fourth = list(getattr(stage, "args", ()))[3:4]
    return getattr(stage, "kw", {}).get("seed", [*fourth, None][0]) is not None


def _parts(data: Any) -> Iterator[Any]:
    """Yield data, the data sets inside of it, and the stages of a webdataset pipeline."""
    waiting, seen = [data], set[int]()
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        waiting.append(getattr(part, "dataset", None))
        pipeline = getattr(part, "pipeline", None)
        waiting += pipeline if isinstance(pipeline, list) else []


def _inner(data: Any) -> Iterator[Any]:
    """Yield what a data set of Hugging Face's ``datasets`` is made of."""
    waiting = [getattr(data, "_ex_iterable", None)]
    while waiting:
        part = waiting.pop()
        if part is not None:
            yield part
            waiting += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", [])]

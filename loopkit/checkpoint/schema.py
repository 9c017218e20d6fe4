"""The form of a run's state in a checkpoint, checked once when it is read, field by field.

The checksums of a checkpoint say that nothing changed since it was written. They do not say that
loopkit wrote it. So the fields that loopkit knows are checked here, before anything uses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from loopkit.checkpoint.format import STATE
from loopkit.errors import CheckpointError, LoopkitError

Check = Callable[[Any, str], None]
"""Raises ``_WrongForm`` if a value, named by its path, has not the form."""

_LARGEST = 1 << 62


class _WrongForm(Exception):
    """A field has another form than it was written in."""


def _kind(expected: str, holds: Callable[[Any], bool]) -> Check:
    def check(value: Any, path: str) -> None:
        if not holds(value):
            raise _WrongForm(f"{path}: {expected} is expected, and it is {str(value)[:60]!a}")

    return check


def _optional(inner: Check) -> Check:
    return lambda value, path: None if value is None else inner(value, path)


def _each(inner: Check) -> Check:
    """Return the check of a dict from texts to values of one form."""

    def check(value: Any, path: str) -> None:
        _DICT(value, path)
        for key, item in value.items():
            _TEXT(key, f"{path} (key)")
            inner(item, f"{path}.{key}")

    return check


def _items(inner: Check, length: int | None = None) -> Check:
    """Return the check of a list or tuple of values of one form."""

    def check(value: Any, path: str) -> None:
        _LIST(value, path)
        if length is not None and len(value) != length:
            raise _WrongForm(f"{path}: {length} items are expected, and it has {len(value)}")
        for number, item in enumerate(value):
            inner(item, f"{path}[{number}]")

    return check


def _fields(known: Mapping[str, Check], needed: bool = True) -> Check:
    """Return the check of a dict with named fields; others are left to whoever reads them."""

    def check(value: Any, path: str) -> None:
        _DICT(value, path)
        for name, inner in known.items():
            full = f"{path}.{name}" if path else name
            if name in value:
                inner(value[name], full)
            elif needed:
                raise _WrongForm(f"{full} is missing")

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value == int(value) if _is_finite(value) else False


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) < _LARGEST and not math.isnan(value)


def _is_too_large(value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= _LARGEST


_ANY: Check = lambda value, path: None  # noqa: E731 - one line of a table
_DICT = _kind("an object", lambda value: isinstance(value, dict))
_LIST = _kind("a list", lambda value: isinstance(value, (list, tuple)))
_TEXT = _kind("a text", lambda value: isinstance(value, str))
_FLAG = _kind("true or false", lambda value: isinstance(value, bool))
_NUMBER = _kind("a number", lambda value: _is_number(value) and not _is_too_large(value))
_COUNT = _kind("a whole number from 0", lambda value: _is_count(value) and value >= 0)
_SECONDS = _kind("seconds from 0", lambda value: _is_finite(value) and value >= 0)
_TENSOR = _kind("a tensor", lambda value: isinstance(value, Tensor))


def _accumulated(value: Any, path: str) -> None:
    """Check a value that was collected for the next log: how it is reduced, and its parts."""
    _items(_ANY, 2)(value, path)
    _TEXT(value[0], f"{path}[0]")
    _items(_items(_NUMBER, 2))(value[1], f"{path}[1]")


def _random_state(value: Any, path: str) -> None:
    """Check the state of the generators, or a list with that of each rank."""
    generators = _fields({"torch": _TENSOR, "python": _LIST, "numpy": _LIST})
    (_items(generators) if isinstance(value, list) else generators)(value, path)


_OPTIMIZER = _fields(
    {
        "class": _TEXT,
        "groups": _items(_fields({"params": _items(_TEXT)})),
        "values": _each(_ANY),
    }
)
_KEPT = _fields(
    {
        "trackers": _each(_COUNT),
        "ranks": _items(_each(_fields({"states": _each(_ANY), "counters": _each(_ANY)}))),
    },
    needed=False,
)
_COUNTERS = ("epoch", "step", "step_in_epoch", "position", "samples", "tokens")
_BEST = _fields({"metric": _TEXT, "value": _NUMBER, "step": _COUNT}, needed=False)
_STATE: dict[str, Check] = {
    "task": _fields({"class": _TEXT, "hparams": _each(_ANY), "unsaved": _items(_TEXT)}),
    "progress": _fields({**dict.fromkeys(_COUNTERS, _COUNT), "seconds": _SECONDS}),
    "extra_state": _each(_ANY),
    "optimizers": _each(_OPTIMIZER),
    "requires_grad": _each(_FLAG),
    "new_buffers": _items(_TEXT),
    "unsaved_attributes": _items(_TEXT),
    "options": _each(_ANY),
    "seed": _each(_ANY),
    "data": _ANY,
    "measured": _optional(_items(_COUNT, 2)),
    "kept_metrics": _KEPT,
    "accumulator": _each(_accumulated),
    "schedules": _each(_each(_ANY)),
    "scaler": _each(_ANY),
    "hooks": _each(_ANY),
    "hooks_by_rank": _each(_items(_ANY)),
    "triggers": _fields({"requests": _items(_TEXT), "clocks": _each(_SECONDS)}),
    "metrics": _each(_NUMBER),
    "best": _BEST,
    "loops": _each(_ANY),
    "rng": _random_state,
    "training_weights": _each(_TENSOR),
}
NEEDED_TO_RESUME = (
    "progress", "optimizers", "data", "accumulator", "schedules", "scaler", "hooks", "triggers",
    "metrics", "best", "loops", "rng",
)  # fmt: skip
"""The fields without which a run cannot be resumed."""


def check_state(
    state: Mapping[str, Any],
    path: Path | str,
    needed: tuple[str, ...] = (),
    only: Collection[str] = _STATE.keys(),
) -> None:
    """Check the form of the fields of a run's state that loopkit knows.

    Args:
        state: of the checkpoint's snapshot.
        path: the checkpoint's directory, for the message.
        needed: the fields that must be there.
        only: the fields that the caller uses.

    Raises:
        CheckpointError: naming the file and the field.
    """
    with reading(path):
        for name in needed:
            if name not in state:
                raise _WrongForm(f"{name} is missing")
        _fields({name: _STATE[name] for name in only}, needed=False)(state, "")


def check_like(saved: Any, present: Any, path: str, open_flags: bool = True) -> None:
    """Check that a saved value has the form of the one that it replaces, as far as that tells.

    Args:
        saved: from a checkpoint, inside of :func:`reading`.
        present: of the object that takes it over. Of two dicts the common names are compared.
        path: the name of the field.
        open_flags: whether a flag that is true or false now may have been None.
    """
    if isinstance(present, bool):
        (_optional(_FLAG) if open_flags else _FLAG)(saved, path)
    elif _is_number(present):
        if not isinstance(saved, Tensor):
            _NUMBER(saved, path)
    elif isinstance(present, str):
        _TEXT(saved, path)
    elif isinstance(present, Tensor):
        (_NUMBER if _is_number(saved) else _TENSOR)(saved, path)
    elif isinstance(present, dict):
        _DICT(saved, path)
        for name in present.keys() & saved.keys():
            check_like(saved[name], present[name], f"{path}.{name}")
    elif isinstance(present, (list, tuple)):
        _LIST(saved, path)
        if isinstance(present, tuple):  # torch's pairs of numbers; lists may have any length
            _items(_ANY, len(present))(saved, path)
        for number, (old, new) in enumerate(zip(saved, present)):
            check_like(old, new, f"{path}[{number}]")


@contextmanager
def reading(path: Path | str, field: str = "") -> Iterator[None]:
    """Inside, an object takes over a field of the state: what it raises names file and field.

    Raises:
        CheckpointError: in place of any error but loopkit's own.
    """
    try:
        yield
    except (LoopkitError, Warning) as error:
        if type(error) is CheckpointError and str(path) not in str(error):
            raise CheckpointError(f"{Path(path) / STATE}: {error}") from error
        raise
    except _WrongForm as error:
        raise CheckpointError(f"{Path(path) / STATE}: {error}") from None
    except Exception as error:
        raise CheckpointError(
            f"{Path(path) / STATE}: {field} cannot be loaded: {type(error).__name__}: {error}"
        ) from error

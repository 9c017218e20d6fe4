"""Simple Python values as JSON and back: the leaves of :mod:`loopkit.checkpoint.codecs`."""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any

import numpy as np
import torch

_EXACT_INT = 1 << 53
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# The bytes of numbers and times say everything about them; text and objects are refused.
_NUMPY = re.compile(r"[<>|][biufcmM]\d{1,2}(\[[0-9a-zA-Z/]{1,20}\])?")


def has_no_surrogates(value: str) -> bool:
    """Return whether JSON keeps a text: it would join two lone surrogates into one character."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def text(value: str) -> Any:
    """Return a text as it is if JSON keeps it, and tagged otherwise."""
    if has_no_surrogates(value):
        return value
    return {"$str": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode()}


def _float(value: float) -> Any:
    if math.isfinite(value):
        return value
    # Stored by its bits, because NaN has a sign and a payload.
    return {"$float": struct.pack(">d", value).hex() if math.isnan(value) else str(value)}


def _datetime(value: datetime) -> Any:
    zone = value.tzinfo
    if zone is not None and type(zone) is not timezone:
        raise TypeError(f"{value!r}: only fixed-offset time zones can be saved in a checkpoint")
    fields = [
        value.year,
        value.month,
        value.day,
        value.hour,
        value.minute,
        value.second,
        value.microsecond,
    ]
    return {"$datetime": [fields, value.fold, None if zone is None else _zone(zone)]}


def _timedelta(value: timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _zone(value: timezone) -> list[Any]:
    offset, name = value.utcoffset(None), value.tzname(None)
    return [_timedelta(offset), None if name == timezone(offset).tzname(None) else text(name)]


def _tag(name: str, body: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: {f"${name}": body(value)}


TO_JSON: dict[type, Callable[[Any], Any]] = {
    # Other JSON readers round beyond 2**53, and Python refuses decimal text beyond 4300 digits.
    int: lambda v: v if -_EXACT_INT <= v <= _EXACT_INT else {"$int": hex(v)},
    float: _float,
    complex: _tag("complex", lambda v: struct.pack(">dd", v.real, v.imag).hex()),
    str: text,
    bytes: _tag("bytes", lambda v: base64.b64encode(v).decode()),
    range: _tag("range", lambda v: [hex(v.start), hex(v.stop), hex(v.step)]),
    torch.dtype: _tag("dtype", str),
    torch.device: _tag("device", str),
    datetime: _datetime,
    date: _tag("date", lambda v: [v.year, v.month, v.day]),
    timedelta: _tag("timedelta", _timedelta),
    timezone: _tag("timezone", _zone),
    # Path() makes the concrete class of the system that reads the file.
    PosixPath: _tag("path", lambda v: ["Path", text(str(v))]),
    WindowsPath: _tag("path", lambda v: ["Path", text(str(v))]),
    PurePosixPath: _tag("path", lambda v: ["PurePosixPath", text(str(v))]),
    PureWindowsPath: _tag("path", lambda v: ["PureWindowsPath", text(str(v))]),
}


def read_array(raw: torch.Tensor, dtype: str, shape: list[int]) -> Any:
    """Return the array of C-order bytes ``raw`` (uint8, 1-D).

    Raises:
        ValueError: the bytes, the dtype and the shape do not fit together.
    """
    if raw.dtype is not torch.uint8 or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError("the bytes of an array are expected")
    return raw.numpy().view(_numpy_dtype(dtype)).reshape(tuple(shape))


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if not is_numeric_dtype(name):
        raise ValueError(f"unknown dtype {name!r}")
    return np.dtype(name)


def is_numeric_dtype(name: str) -> bool:
    """Return whether a numpy dtype, given by its ``str``, is one of numbers or times."""
    return _NUMPY.fullmatch(name) is not None


def _scalar(body: list[str]) -> Any:
    (value,) = np.frombuffer(bytes.fromhex(body[1]), dtype=_numpy_dtype(body[0]))
    return value


def _read_float(body: str) -> float:
    if body in ("inf", "-inf"):
        return float(body)
    return float(struct.unpack(">d", bytes.fromhex(body))[0])


def _read_zone(body: list[Any]) -> timezone:
    offset, name = timedelta(*body[0]), body[1]
    if name is None:
        return timezone.utc if not offset else timezone(offset)
    return timezone(offset, name if type(name) is str else FROM_JSON["$str"](name["$str"]))


def _read_datetime(body: list[Any]) -> datetime:
    fields, fold, zone = body
    year, month, day, hour, minute, second, micro = fields
    tzinfo = None if zone is None else _read_zone(zone)
    return datetime(year, month, day, hour, minute, second, micro, tzinfo, fold=fold)


PATHS: dict[str, Callable[[str], PurePath]] = {
    "Path": Path,
    "PurePosixPath": PurePosixPath,
    "PureWindowsPath": PureWindowsPath,
}
FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "$int": lambda body: int(body, 16),
    "$float": _read_float,
    "$complex": lambda body: complex(*struct.unpack(">dd", bytes.fromhex(body))),
    "$str": lambda body: base64.b64decode(body, validate=True).decode("utf-8", "surrogatepass"),
    "$bytes": lambda body: base64.b64decode(body, validate=True),
    "$range": lambda body: range(*(int(part, 16) for part in body)),
    "$dtype": lambda body: _DTYPES[body],
    "$device": torch.device,
    "$date": lambda body: date(*body),
    "$timedelta": lambda body: timedelta(*body),
    "$timezone": _read_zone,
    "$datetime": _read_datetime,
    "$scalar": _scalar,
}

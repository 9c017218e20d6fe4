from __future__ import annotations

import enum
import json
import math
import pickle
import random
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import date, datetime, timedelta, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from snapshots import alike

from loopkit.checkpoint.codecs import MAX_DEPTH, decode, encode
from loopkit.checkpoint.format import dump_json, load_json
from loopkit.errors import CorruptCheckpointError


def back(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = dump_json(encode(value, "", tensors), sort=False)
    return decode(load_json(text, "state.json"), "", tensors)


NAN_WITH_PAYLOAD = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    2**53,
    2**53 + 1,
    -(2**64),
    10**5000,
    -(10**5000),
    0.0,
    -0.0,
    1e16,
    5e-324,
    1.7976931348623157e308,
    math.nan,
    NAN_WITH_PAYLOAD,
    math.inf,
    -math.inf,
    0.1 + 0.2,
    1j,
    complex(-0.0, math.nan),
    "",
    "é😀\0\n",
    "\ud83d\ude00",
    "\udc80",
    b"",
    b"\0\xff",
    "$dict",
    [],
    [1, [2]],
    (),
    (1, (2, [3])),
    {},
    {"a": 1, "b": {"c": ()}},
    {1: "a", (1, 2): "b", None: 3, 1.5: 4, "x": 5},
    {"$tensor": "a"},
    {"$dict": []},
    {"$": 1, "b": 2},
    {"\ud800": 1},
    {True: 1, "True": 2},
    {"z": 1, "a": 2},
    set(),
    {1, 2.5, "a", (1, 2)},
    frozenset({b"x", None}),
    {frozenset({1}), frozenset()},
    OrderedDict([("b", 1), ("a", 2)]),
    OrderedDict({1: 2}),
    Counter("abracadabra"),
    deque([1, 2, 3], maxlen=5),
    deque(),
    range(0, 10, 3),
    range(-(2**70), 2**70),
    torch.Size([2, 3]),
    torch.Size([]),
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.device("cpu"),
    torch.device("cuda:1"),
    torch.device("meta"),
    Path("/a/b c"),
    Path("rel"),
    PurePosixPath("x/y"),
    PureWindowsPath("c:/x"),
    Path("bad\udcff"),
    datetime(2024, 2, 29, 23, 59, 59, 999999),
    datetime(2024, 10, 27, 2, 30, fold=1),
    datetime(2024, 1, 1, tzinfo=timezone.utc),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=-5, minutes=30), "X")),
    date(1, 1, 1),
    timedelta(-999999999),
    timedelta(days=1, microseconds=-1),
    timezone.utc,
    timezone(timedelta(hours=2)),
    np.float32(0.1),
    np.float64("nan"),
    np.int8(-3),
    np.uint64(2**64 - 1),
    np.bool_(True),
    np.complex64(1j),
    np.float16(2),
    np.datetime64("2024-01-01T00:00:00", "ns"),
    np.timedelta64(3, "D"),
    np.longdouble(1) / 3,
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.array(3.0),
    np.zeros((0, 4)),
    np.array([1, 2], dtype=">i4"),
    np.array([True, False]),
    np.arange(4).reshape(2, 2).T,
    np.array(["2024-01-01"], dtype="M8[D]"),
    torch.arange(3),
    torch.tensor(2.5, dtype=torch.bfloat16),
    torch.empty(0, 3),
    torch.randn(3, 4).t(),
    [{"a": (torch.ones(2), {"b": np.ones(2)})}],
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_as_it_was(value):
    assert alike(back(value), value)


def _random(made: random.Random, depth: int) -> Any:
    leaf = depth == 0 or made.random() < 0.3
    if leaf:
        return made.choice(VALUES[:30])
    size = made.randrange(4)
    parts = [_random(made, depth - 1) for _ in range(size)]
    keys = [
        made.choice(["a", "$b", 1, (2, "c"), None, b"k", "é", 2.5, frozenset({1})])
        for _ in range(size)
    ]
    return made.choice(
        [
            list,
            tuple,
            deque,
            lambda p: dict(zip(keys, p)),
            lambda p: OrderedDict(zip(keys, p)),
            lambda p: set(keys),
        ]
    )(parts)


@pytest.mark.parametrize("seed", range(300))
def test_random_structures_come_back_as_they_were(seed):
    value = _random(random.Random(seed), 5)
    assert alike(back(value), value)


def test_the_text_is_strict_json_in_ascii():
    text = dump_json(encode({"a": math.nan, "b": "é", "c": 2**70}, "", {}))
    assert text.isascii()
    json.loads(text, parse_constant=pytest.fail)


def test_tensors_are_named_by_their_path():
    tensors: dict[str, torch.Tensor] = {}
    encode(
        {"hooks": {"EMA": {"shadow": {"w.0": torch.ones(1)}, "l": [torch.ones(1)]}}}, "", tensors
    )
    assert list(tensors) == ["hooks.EMA.shadow.w.0", "hooks.EMA.l[0]"]


def test_two_paths_that_read_the_same_keep_two_tensors():
    value = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)}
    assert alike(back(value), value)


def test_a_parameter_comes_back_as_a_plain_tensor():
    got = back(torch.nn.Parameter(torch.ones(2)))
    assert type(got) is torch.Tensor
    assert not got.requires_grad


def test_changing_an_array_after_encoding_changes_nothing():
    array, tensors = np.ones(3), {}
    data = encode(array, "a", tensors)
    array[:] = 7
    assert decode(data, "a", tensors).tolist() == [1, 1, 1]


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


REFUSED = [
    Color.RED,
    enum.Enum("E", "a").a,
    Text("x"),
    object(),
    lambda: 1,
    namedtuple("P", "x")(1),
    defaultdict(int),
    np.array([object()]),
    np.array(["a"]),
    np.str_("a"),
    np.ma.array([1]),
    np.zeros(1, dtype=[("a", "i4")]),
    bytearray(b"x"),
    memoryview(b"x"),
    print,
    int,
    torch.nn.Linear(1, 1),
    torch.Generator(),
    datetime(
        2024,
        1,
        1,
        tzinfo=type(
            "Z", (timezone.utc.__class__.__base__,), {"utcoffset": lambda s, d: timedelta(0)}
        )(),
    ),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_another_type_is_refused_with_its_path(value):
    with pytest.raises(TypeError, match=r"^hooks\.MyHook\.cache\[1\]: "):
        encode({"hooks": {"MyHook": {"cache": [1, value]}}}, "", {})


def test_a_type_error_names_the_type():
    with pytest.raises(TypeError, match=r"test_codecs\.Color"):
        encode({"a": Color.RED}, "", {})


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_nesting_up_to_the_limit_is_kept():
    for build in (
        _nested,
        lambda n: _chain(n, lambda v: {1: v}),
        lambda n: _chain(n, lambda v: (v,)),
    ):
        assert alike(back(build(MAX_DEPTH)), build(MAX_DEPTH))


def _chain(depth: int, wrap: Any) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


def test_nesting_beyond_the_limit_is_refused_both_ways():
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        encode(_nested(MAX_DEPTH + 1), "a", {})
    with pytest.raises(CorruptCheckpointError, match="nested more than 100 deep"):
        decode(_nested(MAX_DEPTH + 1), "a", {})
    with pytest.raises(CorruptCheckpointError, match="nested more than 100 deep"):
        decode(_chain(MAX_DEPTH + 1, lambda v: {"$tuple": [v]}), "a", {})


def test_a_list_that_holds_itself_is_refused():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="hold itself"):
        encode({"a": loop}, "", {})


BAD = [
    {"$nope": 1}, {"$tuple": 1}, {"$tuple": [1], "b": 2}, {"$tensor": "missing"}, {"$tensor": [1]}, {"$dict": [[1]]},
    {"$dict": [[[1], 2]]}, {"$dict": [["a", 1], ["a", 2]]}, {"$set": [1, 1]}, {"$set": [[1]]}, {"$int": "z"}, {"$int": 5},
    {"$float": "nan()"}, {"$float": 1}, {"$bytes": "%%"}, {"$str": "!"}, {"$dtype": "torch.nn"}, {"$dtype": "os.system"},
    {"$device": "os.system('x')"}, {"$device": None}, {"$date": [0, 0, 0]}, {"$datetime": [[1], 0, None]},
    {"$timedelta": ["a"]}, {"$timezone": [[99, 0, 0], None]}, {"$scalar": ["O", "00"]}, {"$scalar": ["<f4", "00"]},
    {"$scalar": ["<f4", "0000000000000000"]}, {"$array": ["missing", "<f4", [1]]}, {"$array": ["t", "O", [1]]},
    {"$array": ["t", "<f4", [-1]]}, {"$array": ["t", "<f4", [1 << 62, 1 << 62]]}, {"$array": ["f", "<f4", [2]]},
    {"$path": ["os.system", "x"]}, {"$path": ["Path", 1]}, {"$size": ["a"]}, {"$deque": []}, {"$deque": ["a", 1]},
    {"$range": ["0x1", "0x2", "0x0"]}, {"$complex": "00"}, {"$Counter": [[[], 1]]}, {"$OrderedDict": 3},
]  # fmt: skip


@pytest.mark.parametrize("data", BAD, ids=str)
def test_what_encode_does_not_write_is_corrupt(data):
    with pytest.raises(CorruptCheckpointError, match=r"^hooks\[0\]"):
        decode([data], "hooks", {"t": torch.zeros(4, dtype=torch.uint8), "f": torch.zeros(2)})


def test_a_pickle_is_only_bytes():
    assert back(pickle.dumps(print)) == pickle.dumps(print)

"""Batches of any kind are moved, cast and counted: objects, dataclasses, packed sequences."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from loopkit.data.batches import map_batch, sample_count
from loopkit.data.transfer import transfer_fn
from loopkit.errors import DataError, LoopkitWarning
from tests.support import Tiny, points, quiet

ONE = torch.ones(2, 3)


@dataclasses.dataclass
class Plain:
    x: torch.Tensor
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    x: Any
    rows: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", len(self.x))


class Named(NamedTuple):
    x: torch.Tensor


class Graphs(SimpleNamespace):
    """Moves all it holds, as the batches of graph libraries do."""

    def to(self, *args: Any, **options: Any) -> Graphs:
        return Graphs(**{k: v.to(*args, **options) for k, v in vars(self).items()})


class DeviceOnly:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> DeviceOnly:
        return DeviceOnly(self.x.to(device))


class Applies:
    """Keeps its tensors where only its own walk reaches them."""

    __slots__ = ("kept",)

    def __init__(self, x: torch.Tensor) -> None:
        self.kept = [[x]]

    @property
    def x(self) -> torch.Tensor:
        return self.kept[0][0]

    def apply(self, function: Any) -> Applies:
        return Applies(function(self.x))

    def to(self, device: Any, non_blocking: bool = False) -> Applies:
        return self.apply(lambda tensor: tensor.to(device))


class Dotted(dict):
    __getattr__ = dict.__getitem__


class Encoding(UserDict):
    """Has ``.to``, as transformers' BatchEncoding, and plain items."""

    def to(self, device: Any) -> Encoding:
        raise AssertionError("its items are moved one by one")


class Tagged(list):
    tag = "kept"


KINDS = {
    "tuple": ((ONE, ["a"]), lambda b: b[0]),
    "named tuple": (Named(ONE), lambda b: b.x),
    "dict": ({"x": ONE}, lambda b: b["x"]),
    "dict with attributes": (Dotted(x=ONE), lambda b: b.x),
    "OrderedDict": (OrderedDict(x=ONE), lambda b: b["x"]),
    "defaultdict": (defaultdict(list, x=ONE), lambda b: b["x"]),
    "encoding": (Encoding(x=ONE), lambda b: b["x"]),
    "list subclass": (Tagged([ONE]), lambda b: b[0]),
    "dataclass": (Plain(ONE), lambda b: b.x),
    "frozen": (Frozen(ONE), lambda b: b.x),
    "slots": (Slots(ONE), lambda b: b.x),
    "nested": ({"a": [Frozen(Plain(ONE))]}, lambda b: b["a"][0].x.x),
    "graphs": (Graphs(x=ONE), lambda b: b.x),
    "device only": (DeviceOnly(ONE), lambda b: b.x),
    "applies": (Applies(ONE), lambda b: b.x),
    "packed": (nn.utils.rnn.pack_sequence([ONE, ONE[:1]]), lambda b: b.data),
    "packed in a tuple": ((nn.utils.rnn.pack_sequence([ONE, ONE[:1]]), ONE), lambda b: b[0].data),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_any_kind_is_moved_and_cast_and_stays_what_it_is(kind):
    batch, tensor_of = KINDS[kind]
    moved = transfer_fn(torch.device("meta"), None)(batch)
    assert type(moved) is type(batch)
    assert tensor_of(moved).is_meta
    assert tensor_of(moved).dtype == torch.float32
    cast = transfer_fn(torch.device("cpu"), torch.bfloat16)(batch)
    assert type(cast) is type(batch)
    assert tensor_of(cast).dtype == torch.bfloat16
    assert tensor_of(batch).dtype == torch.float32, "the user's own batch is not changed"


def test_only_floats_are_cast_and_the_rest_of_a_batch_is_kept():
    batch = Graphs(x=ONE, y=torch.tensor([1, 2]))
    cast = transfer_fn(torch.device("cpu"), torch.float64)(batch)
    assert (cast.x.dtype, cast.y.dtype) == (torch.float64, torch.int64)
    moved = transfer_fn(torch.device("meta"), None)([Plain(ONE, "b"), Slots(ONE), "text", None])
    assert (moved[0].name, moved[1].rows, moved[2:]) == ("b", 2, ["text", None])
    assert map_batch(Tagged([ONE]), torch.neg, id).tag == "kept"
    packed = transfer_fn(torch.device("meta"), None)(KINDS["packed"][0])
    assert packed.batch_sizes.device.type == "cpu"


def test_an_object_whose_tensors_cannot_be_cast_is_named():
    class Closed:
        def to(self, device: Any) -> Closed:
            return self

    with pytest.raises(DataError, match=r"a Closed cannot be reached: give it a method apply"):
        transfer_fn(torch.device("cpu"), torch.bfloat16)(Closed())


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.ones(3, 2), 3),
        ((torch.ones(3), torch.ones(4)), 3),
        ({"a": {"b": torch.ones(5)}}, 5),
        ([torch.tensor(1.0), torch.ones(2)], 2),
        (["a", "b"], 2),
        ({"a": ["x"] * 4}, 4),
        ({}, 0),
        ("text", 1),
        (None, 1),
        (torch.tensor(2.0), 1),
        (np.zeros((6, 2)), 6),
        (Plain(torch.ones(4, 1)), 4),
        (Frozen(Plain(ONE)), 2),
        (nn.utils.rnn.pack_sequence([torch.ones(5), torch.ones(2), torch.ones(1)]), 3),
        (SimpleNamespace(x=torch.ones(9), num_graphs=2), 2),
        (SimpleNamespace(batch_size=torch.Size([7, 2])), 7),
        ((SimpleNamespace(batch_size=5), torch.ones(8)), 5),
        (SimpleNamespace(x=torch.ones(9)), None),
        (object(), None),
    ],
)
def test_the_number_of_samples_in_a_batch(batch, size):
    assert sample_count(batch) == size
    assert sample_count(Dotted(x=torch.ones(3))) == 3


class Objects(Tiny):
    """Trains on objects that loopkit did not put together."""

    def __init__(self, batches: Any) -> None:
        super().__init__(dropout=0.0)
        self.batches = batches

    def train_data(self) -> Any:
        return self.batches

    eval_data = train_data

    def train_step(self, batch: Any) -> Any:
        return super().train_step((batch.x, batch.y))

    def eval_step(self, batch: Any) -> Any:
        return super().eval_step((batch.x, batch.y))


def batches(kind: Any) -> list[Any]:
    x, y = points(12).tensors
    return [kind(x=x[a:b], y=y[a:b]) for a, b in ((0, 8), (8, 9), (9, 12))]


@dataclasses.dataclass(frozen=True)
class XY:
    x: torch.Tensor
    y: torch.Tensor


class Counts(Objects):
    def count_samples(self, batch: Any) -> int:
        return len(batch.y)


@pytest.mark.parametrize("kind", ["dataclass", "object"])
def test_losses_are_averaged_by_the_samples_of_object_batches(kind):
    task = Objects(batches(XY)) if kind == "dataclass" else Counts(batches(Graphs))
    whole = Tiny(dropout=0.0)
    whole.eval_data = lambda: points(12)
    expected = quiet(eval_batch_size=12).evaluate(whole)["eval/loss"]
    assert quiet().evaluate(task)["eval/loss"] == pytest.approx(expected, rel=1e-6)
    result = quiet(epochs=1, accumulate=3, eval_every="never").run(task)
    assert result.progress.samples == 12


@pytest.mark.parametrize("precision", ["fp64", "bf16-true"])
@pytest.mark.parametrize("kind", [XY, Graphs])
def test_object_batches_train_in_another_precision(precision, kind):
    task = Counts(batches(kind))
    assert quiet(epochs=1, precision=precision, eval_every="never").run(task).step == 3


def test_an_unknown_number_of_samples_is_an_error_that_says_how_to_give_it():
    with pytest.raises(DataError, match=r"type Graphs, .* def count_samples\(self, batch\)"):
        quiet().run(Objects(batches(Graphs)))

    class Wrong(Objects):
        def count_samples(self, batch: Any) -> Any:
            return "many"

    with pytest.raises(DataError, match="count_samples returned 'many'"):
        quiet().run(Wrong(batches(Graphs)))


def test_tensors_that_disagree_about_the_number_of_samples_are_reported():
    graph = (torch.ones(5, 8), torch.ones(2, 9))

    class Sums(Tiny):
        def train_data(self) -> Any:
            return [graph, graph]

        def train_step(self, batch: Any) -> Any:
            return self.net(batch[0]).mean()

    with pytest.warns(LoopkitWarning, match=r"different dimensions, 5, 2: the first is taken"):
        quiet(eval_every="never").run(Sums())


def test_a_tensor_is_data():
    class Rows(Tiny):
        def train_data(self) -> Any:
            return torch.arange(48.0).reshape(6, 8)

        def train_step(self, batch: Any) -> Any:
            seen.append(batch[:, 0].tolist())
            return self.net(batch).mean()

    seen: list[Any] = []
    quiet(eval_every="never", batch_size=4, epochs=1).run(Rows())
    assert sorted(i for part in seen for i in part) == [0, 8, 16, 24, 32, 40]
    assert [len(part) for part in seen] == [4, 2]

"""Nested values: containers keep their form, leaves are reached depth first."""

from __future__ import annotations

from collections import UserDict, namedtuple

import torch

from loopkit.nested import (
    leaves,
    map_instances,
    map_tensors,
    named_leaves,
    token_count,
)

Pair = namedtuple("Pair", "x y")


class Encoding(UserDict):
    """A mapping that builds itself from a dict, as transformers' BatchEncoding does."""


def test_tensors_are_mapped_and_containers_keep_their_form():
    nested = {"a": [torch.ones(1), "text"], "b": Pair(torch.ones(2), 3), "c": (None, torch.ones(3))}
    doubled = map_tensors(lambda tensor: tensor * 2, nested)
    assert doubled["a"][0].tolist() == [2]
    assert doubled["a"][1] == "text"
    assert type(doubled["b"]) is Pair
    assert doubled["b"].x.tolist() == [2, 2]
    assert doubled["c"][1].tolist() == [2, 2, 2]
    encoded = map_tensors(lambda tensor: tensor * 2, Encoding({"x": torch.ones(1)}))
    assert type(encoded) is Encoding
    assert encoded["x"].tolist() == [2]


def test_instances_of_any_kind_are_mapped():
    assert map_instances(float, str, [1.5, 2, {"a": (0.5,)}]) == ["1.5", 2, {"a": ("0.5",)}]


def test_leaves_come_depth_first_with_their_names():
    nested = {"a": {"b": 1, "c": [2, (3,)]}, "d": 4}
    assert list(leaves(nested)) == [1, 2, 3, 4]
    assert list(leaves(5)) == [5]
    assert list(named_leaves(nested)) == [("a/b", 1), ("a/c", [2, (3,)]), ("d", 4)]
    assert list(named_leaves(nested, "eval")) == [
        ("eval/a/b", 1),
        ("eval/a/c", [2, (3,)]),
        ("eval/d", 4),
    ]
    assert list(named_leaves(7, "eval")) == [("eval", 7)]


def test_tokens_are_the_elements_of_input_ids():
    assert token_count({"input_ids": torch.ones(2, 3)}) == 6
    assert token_count({"x": torch.ones(2)}) == token_count((torch.ones(2),)) == 0


def test_a_packed_sequence_keeps_its_batch_sizes():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    moved = map_tensors(lambda tensor: tensor.to("meta"), packed)
    assert moved.data.is_meta
    assert moved.batch_sizes.tolist() == [2, 1, 1]

"""Outputs of any form are joined to those of all samples, in order, or an error says what is wrong."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from loopkit import Task
from loopkit.errors import TaskError
from loopkit.metrics.outputs import BatchOutput, join_outputs
from tests.support import quiet

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Found:
    scores: Any
    texts: Any = None


class Returning(Task):
    """Returns what ``outputs`` makes of the ids of a batch, [samples]."""

    def __init__(self, outputs):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.outputs = outputs
        self.seen: Any = None

    def eval_step(self, batch):
        return self.outputs(batch[0])

    def predict_step(self, batch):
        return self.outputs(batch[0])

    def compute_metrics(self, outputs):
        self.seen = outputs
        return {}


def predicted(outputs, count=7, size=3):
    data = TensorDataset(torch.arange(count))
    return quiet(eval_batch_size=size).predict(Returning(outputs), data)


def evaluated(outputs, count=7, size=3):
    task = Returning(outputs)
    quiet(eval_batch_size=size).evaluate(task, TensorDataset(torch.arange(count)))
    return task.seen.values


def boxes(ids):
    """One dict for each image, with as many boxes as its number says."""
    return [{"boxes": torch.full((int(i), 4), int(i)), "id": int(i)} for i in ids]


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize(("count", "size"), [(7, 3), (7, 1), (4, 2), (9, 4)])
def test_entries_by_image_come_each_once(container, count, size):
    for found in (
        predicted(lambda ids: container(boxes(ids)), count, size),
        evaluated(lambda ids: {"preds": container(boxes(ids))}, count, size)["preds"],
    ):
        assert [entry["id"] for entry in found] == list(range(count))
        assert [len(entry["boxes"]) for entry in found] == list(range(count))


def test_a_collated_tuple_of_targets_is_chained():
    def step(ids):
        images, targets = tuple(zip(*[(torch.ones(2), {"id": int(i)}) for i in ids]))
        return {"preds": images, "target": targets, "by": [[int(i)] * int(i) for i in ids]}

    found = evaluated(step)
    assert [target["id"] for target in found["target"]] == list(range(7))
    assert len(found["preds"]) == 7
    assert found["by"][3] == [3, 3, 3]


def test_tuples_of_whole_batches_keep_their_form_at_any_size():
    for count, size in ((7, 3), (7, 2), (2, 2), (6, 2), (3, 1)):
        left, right, nothing = predicted(lambda ids: (ids, ids[:, None] * 2, None), count, size)
        assert left.tolist() == list(range(count))
        assert right.shape == (count, 1)
        assert nothing is None


def test_a_tuple_of_dicts_that_may_be_read_in_two_ways_is_refused():
    with pytest.raises(TaskError, match=r"may be read in two ways.*Return a list"):
        predicted(lambda ids: ({"a": ids}, {"a": ids}), 4, 2)
    first, second = predicted(lambda ids: ({"a": ids}, {"a": ids}), 7, 3)
    assert first["a"].tolist() == second["a"].tolist() == list(range(7))


def test_named_tuples_dataclasses_and_model_outputs_keep_their_form():
    from transformers.modeling_outputs import TokenClassifierOutput

    assert predicted(lambda ids: Pair(ids, ids)).y.tolist() == list(range(7))
    found = predicted(lambda ids: {"in": Found(ids, [str(int(i)) for i in ids])})["in"]
    assert type(found) is Found
    assert found.texts == [str(i) for i in range(7)]
    out = predicted(lambda ids: TokenClassifierOutput(logits=ids[:, None], attentions=(ids, ids)))
    assert type(out) is TokenClassifierOutput
    assert out.logits.shape == (7, 1)
    assert out.loss is None
    assert [part.tolist() for part in out["attentions"]] == [list(range(7))] * 2


def test_hidden_states_in_a_list_stay_a_list_of_layers():
    found = predicted(lambda ids: [ids[:, None].float()] * 5, 7, 3)
    assert [layer.shape for layer in found] == [(7, 1)] * 5


def test_arrays_of_numpy_and_nested_and_sparse_tensors_are_joined():
    assert predicted(lambda ids: ids.numpy()).tolist() == list(range(7))
    found = evaluated(lambda ids: {"preds": ids.numpy(), "target": ids.to_sparse()})
    assert found["preds"].tolist() == found["target"].tolist() == list(range(7))
    rows = predicted(lambda ids: _jagged(ids))
    assert [len(row) for row in rows] == list(range(7))


def _jagged(ids):
    return torch.nested.nested_tensor([torch.ones(int(i)) for i in ids], layout=torch.jagged)


def test_a_squeezed_last_batch_gets_its_dimension_back():
    assert predicted(lambda ids: ids[:, None].squeeze(), 7, 3).tolist() == list(range(7))
    rows = predicted(lambda ids: ids[:, None].expand(-1, 4).squeeze(), 7, 3)
    assert rows[:, 2].tolist() == list(range(7))
    maps = predicted(lambda ids: ids[:, None, None].expand(-1, 2, 5).squeeze(), 5, 2)
    assert maps.shape == (5, 2, 5)
    assert evaluated(lambda ids: {"preds": ids[:, None].squeeze()})["preds"].shape == (7,)
    assert evaluated(lambda ids: {"preds": ids[:, None].squeeze()}, 3, 1)["preds"].shape == (3,)


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "uint16", "uint32", "int8", "int64", "bool", "float16", "bfloat16", "float64"],
)
def test_ragged_rows_are_padded_by_a_value_that_is_none_of_theirs(dtype):
    def step(ids):
        return torch.ones(len(ids), int(ids[-1]) + 1).to(getattr(torch, dtype))

    for found in (predicted(step), torch.from_numpy(evaluated(lambda i: {"a": step(i)})["a"])):
        assert found.shape == (7, 7)
        padding = False if dtype == "bool" else -100
        assert (found[0] == torch.tensor([1] * 3 + [padding] * 4).to(found.dtype)).all()
        assert (found[6] == 1).all()


def test_what_cannot_be_padded_is_refused():
    ragged = {"ids": lambda i: np.ones((len(i), int(i[-1])), "uint64")}
    with pytest.raises(
        TaskError, match=r"'x/ids' of what .*eval_step returned has rows of different"
    ):
        evaluated(lambda ids: {"x": {"ids": ragged["ids"](ids)}})
    with pytest.raises(TaskError, match="different shapes, and -100 cannot pad <U1"):
        predicted(lambda ids: np.full((len(ids), int(ids[-1])), "a"))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda i: {"a": i, "b": i} if i[0] == 0 else {"a": i}, "'b' .*is in batch 0 and not in batch 1"),
        (lambda i: {"a": i} if i[0] == 0 else {"a": i, "b": i}, "'b' .*is in batch 1 and not in batch 0"),
        (lambda i: {"a": {"b": i if i[0] < 6 else None}}, "'a/b' .*is a tensor of shape .3,. in batch 0 and None in batch 2"),
        (lambda i: {"a": i if i[0] < 6 else i.tolist()}, "'a' .*and a list in batch 2"),
        (lambda i: {"a": i[:, None] if i[0] != 3 else i}, "'a' .*shape .3, 1. in batch 0 and .*shape .3,. in batch 1"),
        (lambda i: {"a": i, "b": i[1:]}, "'b' .*has 2 entries in batch 0, which has 3 sample"),
        (lambda i: {"a": i, "b": (i[1:],)}, "'b/0' .*has 2 entries in batch 0"),
        (lambda i: {"a": i.tolist()[1:]}, "'a' .*has 2 entries in batch 0"),
        (lambda i: {"a": tuple([1] * int(i[0] + 1))}, "'a' .*is a tuple of "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(outputs, message):
    with pytest.raises(TaskError, match=message):
        evaluated(outputs)
    with pytest.raises(TaskError, match=message.replace("eval_step", "predict_step")):
        predicted(outputs)


def test_the_error_comes_at_the_batch_that_does_not_fit():
    seen = []

    def step(ids):
        seen.append(int(ids[0]))
        return {"a": ids} if ids[0] < 3 else {}

    with pytest.raises(TaskError):
        predicted(step, 30, 3)
    assert seen == [0, 3]


def test_parts_may_all_have_the_tokens_of_a_batch():
    found = evaluated(lambda i: {"preds": i.repeat_interleave(i), "target": i.repeat_interleave(i)})
    assert found["preds"].tolist() == found["target"].tolist()
    assert len(found["preds"]) == sum(range(7))


def test_values_that_are_no_samples_stay_one_for_each_batch():
    found = evaluated(lambda ids: {"n": len(ids), "none": None, "text": "a", "mean": ids.sum()})
    assert found["n"] == [3, 3, 1]
    assert found["none"] is None
    assert found["text"] == ["a"] * 3
    assert found["mean"].tolist() == [3, 12, 6]


def test_no_batch_gives_an_empty_list():
    assert join_outputs([], "predict_step") == []
    assert join_outputs([BatchOutput((), 2), BatchOutput((), 2)], "predict_step") == ()

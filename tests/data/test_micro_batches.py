"""MicroBatches: copies keep every attribute; dummy batches fill a group up."""

from __future__ import annotations

import torch

from loopkit.data.micro_batches import MicroBatches


def group() -> MicroBatches:
    """Two micro-batches, every attribute with a value of its own."""
    made = MicroBatches(8)
    made.extend([torch.zeros(4), torch.ones(2)])
    made.sizes = [4, 2]
    made.samples = 6
    made.total = 12
    made.end = 20
    made.tokens = 5
    made.last = True
    made.state = {"own": 1}
    return made


def attributes(batches: MicroBatches) -> dict[str, object]:
    return {name: getattr(batches, name) for name in MicroBatches.__slots__}


def test_other_batches_leave_every_other_attribute():
    whole = group()
    halves = [*whole[0].split(2), *whole[1].split(1)]
    cut = whole.with_batches(halves, [2, 2, 1, 1])
    assert list(map(len, cut)) == cut.sizes == [2, 2, 1, 1]
    assert attributes(cut) == {**attributes(whole), "sizes": [2, 2, 1, 1]}
    assert len(whole) == 2
    assert whole.sizes == [4, 2]


def test_a_short_group_is_filled_up_with_dummy_batches_of_its_last():
    whole = group()
    padded = whole.padded(4)
    assert [batch is whole[1] for batch in padded] == [False, True, True, True]
    assert padded.sizes == [4, 2, 0, 0]
    assert attributes(padded) == {**attributes(whole), "sizes": [4, 2, 0, 0], "end": 12}


def test_dummies_follow_the_group_and_hold_no_samples():
    whole = group()
    dummies = whole.dummies(3)
    assert all(batch is whole[1] for batch in dummies)
    nothing = {"sizes": [0, 0, 0], "samples": 0, "total": 0, "tokens": 0, "start": 20, "end": 23}
    assert attributes(dummies) == {**attributes(whole), **nothing}

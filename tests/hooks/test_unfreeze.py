from __future__ import annotations

import pytest
import torch
from torch.utils.data import IterableDataset

from loopkit import Hook
from loopkit.errors import LoopkitWarning, OptionError
from loopkit.hooks import Unfreeze
from tests.hooks.runs import Normed, check_resume, weights
from tests.support import Tiny, points, quiet


class Trail(Hook):
    def __init__(self):
        self.after = []

    def on_step_end(self, run, out):
        self.after.append({n: v.clone() for n, v in run.task.state_dict().items()})


def first_moves(start, after):
    """The step at which each entry first differs from the start."""
    return {
        name: next(
            (step for step, now in enumerate(after, 1) if not torch.equal(now[name], value)), None
        )
        for name, value in start.items()
    }


def moves(task, stages, **options):
    trail, start = Trail(), {n: v.clone() for n, v in task.state_dict().items()}
    quiet(batch_size=10, eval_every="2 steps", hooks=[trail, Unfreeze(stages)], **options).run(task)
    return first_moves(start, trail.after)


def test_what_is_named_moves_from_its_time_on():
    found = moves(Tiny(), {"1 epoch": r"net\.0"}, epochs=2)
    assert found == {
        "net.0.weight": 7,
        "net.0.bias": 7,
        "net.3.weight": 2,
        "net.3.bias": 2,
    }  # warmup: step 1 has rate 0


def test_several_stages_and_units():
    found = moves(Tiny(), {3: r"net\.0\.bias", "50%": [r"net\.0", "net.3.weight"]}, epochs=2)
    assert found == {"net.0.weight": 7, "net.0.bias": 4, "net.3.weight": 7, "net.3.bias": 2}


def test_frozen_batch_norm_keeps_its_statistics_until_its_time():
    found = moves(Normed(), {4: r"net\.1"}, epochs=2)
    assert (
        found["net.1.running_mean"]
        == found["net.1.weight"]
        == found["net.1.num_batches_tracked"]
        == 5
    )


def test_nothing_is_left_frozen_behind():
    task = Tiny()
    moves(task, {"100 steps": r"net\.0"}, steps=4)
    assert all(p.requires_grad for p in task.parameters())


def test_decay_does_not_move_what_is_frozen():
    class Decaying(Tiny):
        def optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.5, momentum=0.9)

    assert moves(Decaying(), {"1 epoch": r"net\.0"}, epochs=2)["net.0.weight"] == 7


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"rng": "stream"}], ids=str)
def test_resume_is_bit_identical(options, tmp_path):
    steps = 24 // options.get("accumulate", 1)
    stages = {"1 epoch": r"net\.0\.weight", "60%": r"net\.0"}
    check_resume(
        lambda: Unfreeze(stages),
        tmp_path,
        (1, steps // 3 - 1, steps // 3, steps // 3 + 1, steps - 2),
        **options,
    )


def test_resume_with_batch_norm_is_bit_identical(tmp_path):
    check_resume(lambda: Unfreeze({"1 epoch": r"net\.[01]"}), tmp_path, (2, 8, 9), task=Normed)


class Unsized(IterableDataset):
    def __iter__(self):
        yield from points(20)


class Endless(Tiny):
    def train_data(self):
        return Unsized()


class HeadOnly(Tiny):
    def optimizers(self):
        self.net[0].requires_grad_(False)
        return torch.optim.SGD(self.net[3].parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("task", "stages", "named"),
    [
        (Tiny, {}, "give when and what"),
        (Tiny, {"later": "net"}, "'later'"),
        (Tiny, {"2 min": "net"}, "'2 min'"),
        (Tiny, {2: "net("}, r"'net\(' is not a regular expression"),
        (
            Tiny,
            {2: "encoder"},
            r"'encoder' names no module and no parameter. There are net\.0\.weight",
        ),
        (Tiny, {2: "net.3", 4: "net.0"}, "freezes every parameter"),
        (HeadOnly, {2: r"net\.0"}, r"names net\.0\.weight, which no optimizer holds"),
        (Endless, {"1 epoch": r"net\.0"}, "needs data with a length"),
    ],
)
def test_bad_arguments_are_named(task, stages, named):
    with pytest.raises(OptionError, match=named):
        quiet(steps=8, hooks=[Unfreeze(stages)]).run(task())


def test_a_prefix_of_a_name_is_not_the_name():
    with pytest.raises(OptionError, match="names no module"):
        quiet(steps=1, hooks=[Unfreeze({1: "ne"})]).run(Tiny())


def test_weights_are_those_of_a_run_with_the_parameters_frozen_by_hand():
    class Frozen(Tiny):
        def on_step_start(self, run, batches):
            self.net[0].requires_grad_(run.progress.step >= 3)

    by_hand, by_hook = Frozen(), Tiny()
    quiet(steps=8, batch_size=8).run(by_hand)
    quiet(steps=8, batch_size=8, hooks=[Unfreeze({3: r"net\.0"})]).run(by_hook)
    assert all(
        torch.equal(value, weights(by_hand)[name]) for name, value in weights(by_hook).items()
    )


def test_batch_norm_and_accumulation_are_warned_of():
    with pytest.warns(
        LoopkitWarning, match=r"2 micro-batches make one step, and BatchNorm \(net\.1\).*GroupNorm"
    ):
        quiet(steps=1, batch_size=8, accumulate=2).run(Normed())


def test_batch_norm_that_is_frozen_or_not_accumulated_is_not_warned_of():
    quiet(steps=1, batch_size=8).run(Normed())
    quiet(steps=1, batch_size=8, accumulate=2, hooks=[Unfreeze({4: r"net\.1"})]).run(Normed())

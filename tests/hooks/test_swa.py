from __future__ import annotations

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader

from loopkit import Checkpoint, Hook, Loader
from loopkit.errors import OptionError
from loopkit.hooks import SWA
from tests.hooks.runs import Normed, check_resume, weights
from tests.support import Tiny, digest, points, quiet


class Plain(Normed):
    """Batches in the order of the data, so that a plain loop can read the same ones."""

    def train_data(self):
        return DataLoader(points(64), 8)


class Averaged(Hook):
    """What torch's AveragedModel makes of the same weights."""

    def __init__(self, steps):
        self.steps, self.model = steps, None

    def on_step_end(self, run, out):
        if run.progress.step in self.steps:
            if self.model is None:
                self.model = AveragedModel(run.task.net)
            self.model.update_parameters(run.task.net)


def test_weights_and_statistics_are_those_of_torch():
    task, peer, swa = Plain(), Averaged((24, 28, 32)), SWA(start="20 steps", every=4)
    quiet(epochs=4, hooks=[peer, swa]).run(task)
    assert swa.count == 3
    update_bn([x for x, _ in DataLoader(points(64), 8)], peer.model)
    expected = dict(peer.model.module.state_dict())
    for name, value in task.net.state_dict().items():
        assert torch.allclose(value.float(), expected[name].float(), atol=1e-6), name
    assert task.net[1].momentum == 0.1


def test_the_default_averages_the_last_quarter_once_an_epoch():
    task, trail = Tiny(), []
    fit = quiet(epochs=8, batch_size=10, hooks=[swa := SWA()])
    fit.on("epoch_end", lambda run: trail.append(weights(run.task)))
    fit.run(task)
    assert swa.count == 2
    for name, value in weights(task).items():
        assert torch.allclose(value, (trail[6][name] + trail[7][name]) / 2, atol=1e-6)


def test_modes_and_momentum_are_left_as_they_were():
    task = Normed()
    task.net[1].momentum = 0.3
    quiet(steps=8, batch_size=8, hooks=[SWA(start=4, every=2, batches=3)]).run(task)
    assert (task.net[1].momentum, task.training) == (0.3, True)
    assert int(task.net[1].num_batches_tracked) == 3


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2, "task": Tiny}, {"rng": "stream"}], ids=str
)
def test_resume_is_bit_identical(options, tmp_path):
    options = {"task": Normed, **options}
    check_resume(lambda: SWA(start="50%", every="2 steps"), tmp_path, (1, 6, 8), **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_finished_run_resumed_ends_the_same(workers, tmp_path):
    class Fed(Normed):
        def train_data(self):
            return Loader(points(60), num_workers=workers)

    def once():
        task = Fed(dropout=0.5)
        quiet(
            steps=8,
            batch_size=8,
            run_dir=tmp_path,
            resume="auto",
            checkpoint=True,
            hooks=[SWA(start=4, every=2)],
        ).run(task)
        return digest(task.state_dict())

    assert once() == once()


def test_an_interrupted_run_keeps_its_weights():
    import signal

    task, trail = Normed(), {}
    fit = quiet(steps=8, batch_size=8, hooks=[SWA(start=2, every=1)])

    @fit.on("step_end")
    def interrupt(run, out):
        if run.progress.step == 6:
            signal.raise_signal(signal.SIGINT)
            trail.update(weights(run.task))

    assert fit.run(task).status == "interrupted"
    assert all(torch.equal(value, trail[name]) for name, value in weights(task).items())


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ({"every": "5 min"}, {}, "every='5 min'"),
        ({"start": "soon"}, {}, "start=.*'soon'"),
        ({"batches": 0}, {}, "batches=0"),
        ({"start": 9}, {}, "start='9 steps'.*step 9.*ends at 8"),
        (
            {"start": 4},
            {"checkpoint": Checkpoint(best="eval/loss:min", load_best=True)},
            "load_best",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, options, named):
    with pytest.raises(OptionError, match=named):
        quiet(steps=8, hooks=[SWA(**arguments)], **options).run(Tiny())

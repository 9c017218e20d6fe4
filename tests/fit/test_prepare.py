"""Fit.prepare: a loop by hand computes what Fit.run computes, and what it would pass over is refused."""

from __future__ import annotations

import pytest
import torch

from loopkit.errors import NotFiniteError, OptionError, TaskError
from loopkit.hooks import EMA
from tests.contract.training_jobs import prepared_loop
from tests.support import Tiny, digest, quiet


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 3, "clip_norm": 0.5, "precision": "bf16"},
        {"precision": "fp16", "on_nan": "skip", "global_batch_size": 16},
        {"rng": "stream"},
    ],
)
def test_a_loop_by_hand_ends_with_the_bits_of_fit_run(options):
    options = {"epochs": 2, "batch_size": 8, **options}
    task = Tiny()
    metrics = quiet(**options).run(task).metrics
    found = prepared_loop("tiny", **options)
    assert found["digest"] == digest(task.state_dict())
    assert found["eval/loss"] == metrics["eval/loss"]


def test_weighted_losses_are_those_of_fit_run():
    from tests.contract import jobs

    options = {"epochs": 1, "batch_size": 8, "accumulate": 2, "clip_norm": 0.5}
    alone = jobs.train("single", "words", **options)
    assert prepared_loop("words", strategy="single", **options)["digest"] == digest(alone["model"])


def test_a_pass_that_was_left_is_read_on():
    whole, parts = Tiny(), Tiny()
    quiet(epochs=1, batch_size=8).run(whole)
    with quiet(epochs=1, batch_size=8).prepare(parts) as ready:
        while not ready.progress.epoch:
            for batch in ready.batches():
                ready.backward(ready.forward(batch))
                assert ready.step()
                if ready.progress.step == 3:
                    break
    assert digest(parts.state_dict()) == digest(whole.state_dict())


def test_only_the_last_micro_batch_of_a_step_updates():
    with quiet(batch_size=8, accumulate=4).prepare(Tiny(count=60)) as ready:
        updates = []
        for batch in ready.batches():
            ready.backward(ready.forward(batch))
            updates.append(ready.step())
    assert updates == [False, False, False, True] * 2


def test_a_step_that_leaves_something_out_is_named():
    with quiet(batch_size=8, accumulate=2).prepare(Tiny()) as ready:
        with pytest.raises(TaskError, match="there is no batch yet"):
            ready.forward(None)
        batches = ready.batches()
        batch = next(batches)
        with pytest.raises(TaskError, match="came before forward"):
            ready.backward(torch.ones((), requires_grad=True))
        with pytest.raises(TaskError, match="trains train_step and methods of your own"):
            ready.forward(batch, "predict_step")
        with pytest.raises(TaskError, match=r"reads on without backward\(\)"):
            next(batches)
    with (
        quiet(batch_size=8).prepare(Tiny()) as ready,
        pytest.raises(TaskError, match=r"without step\(\)"),
    ):
        for batch in ready.batches():
            ready.backward(ready.forward(batch))


class Listens(Tiny):
    def on_epoch_end(self, run):
        raise AssertionError


@pytest.mark.parametrize(
    ("task", "options", "told"),
    [
        (Tiny, {"hooks": [EMA(0.9)]}, "hooks=.* is part of Fit's own loop"),
        (Tiny, {"log_every": 5}, "log_every=5 is part"),
        (Tiny, {"loggers": "csv"}, "loggers='csv' is part"),
        (Tiny, {"resume": "auto"}, "resume='auto' is part"),
        (Listens, {}, "Listens.on_epoch_end would not be called"),
    ],
)
def test_what_a_loop_by_hand_would_pass_over_is_refused(task, options, told):
    with pytest.raises(OptionError, match=told), quiet(**options).prepare(task()):
        pass


def test_objects_of_a_loop_elsewhere_are_answered():
    with pytest.raises(
        OptionError, match="takes the task alone, and got a SGD too: the methods opt"
    ):
        quiet().prepare(Tiny(), torch.optim.SGD(Tiny().parameters(), lr=1.0))


def test_a_loss_that_is_not_finite_reaches_no_parameter():
    task = Tiny()
    before = digest(task.state_dict())
    with quiet(batch_size=8).prepare(task) as ready:
        batch = next(ready.batches())
        ready.backward(ready.forward(batch) * float("nan"))
        with pytest.raises(NotFiniteError, match="step 1"):
            ready.step()
    assert digest(task.state_dict()) == before

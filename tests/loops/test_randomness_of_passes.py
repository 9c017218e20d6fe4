"""Several backward passes of one step draw new random numbers, unless the step asks for the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopkit import StepLoop
from tests.support import Tiny, quiet


class Draws(Tiny):
    """Notes a random number of each call of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def train_step(self, batch: Any) -> Any:
        self.drawn.append(float(torch.rand(())))
        return super().train_step(batch)

    def other_step(self, batch: Any) -> Any:
        return self.train_step(batch)


class Passes(StepLoop):
    """Runs ``count`` backward passes of each method, then one update."""

    def __init__(self, count: int, methods: tuple[str, ...] = ("train_step",), **how: Any) -> None:
        self.count, self.methods, self.how = count, methods, how

    def run(self, run: Any, batches: Any) -> Any:
        for _ in range(self.count):
            for method in self.methods:
                out = self.backward(run, batches, method, log=False, **self.how)
        self.update(run)
        return out


def drawn(step: StepLoop | None, **options: Any) -> list[float]:
    task = Draws()
    quiet(steps=3, batch_size=8, eval_every="never", step=step, **options).run(task)
    return task.drawn


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_pass_draws_its_own(accumulate):
    numbers = drawn(Passes(3), accumulate=accumulate)
    assert len(numbers) == len(set(numbers)) == 9 * accumulate
    assert numbers[:accumulate] == drawn(None, accumulate=accumulate)[:accumulate]


def test_two_methods_and_their_passes_draw_their_own():
    numbers = drawn(Passes(2, ("train_step", "other_step")))
    assert len(set(numbers)) == 12


def test_a_pass_that_reuses_draws_the_same():
    numbers = drawn(Passes(2, reuse_rng=True))
    assert [numbers[0::2], numbers[0::2]] == [numbers[1::2], numbers[0::2]]
    assert len(set(numbers)) == 3


def test_one_loop_object_may_serve_two_runs():
    step = Passes(2)
    assert drawn(step) == drawn(step)


def test_a_resumed_run_draws_the_same(tmp_path):
    whole = drawn(Passes(2))
    task = Draws()
    fit = quiet(
        steps=3, batch_size=8, eval_every="never", step=Passes(2), run_dir=tmp_path,
        checkpoint=True, resume="auto",
    )  # fmt: skip
    stopped = fit.with_options()
    stopped.on("step_end", lambda run, out: run.stop("here"))
    stopped.run(task)
    task.drawn.clear()
    fit.run(task)
    assert task.drawn == whole[2:]

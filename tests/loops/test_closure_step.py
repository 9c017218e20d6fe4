"""ClosureStep: LBFGS by one line equals the loop by hand, with accumulation and any resume."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from loopkit import Checkpoint, ClosureStep, Task
from loopkit.errors import NotFiniteError, OptionError, TaskError
from loopkit.optim import SGD, build, step_decay
from tests.support import quiet


def curve(count: int = 48) -> TensorDataset:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x @ torch.tensor([[1.0], [2.0], [-1.0]])).tanh())


class Curve(Task):
    def __init__(self, search: str | None = None, dropout: float = 0.0, weighted: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.search, self.weighted = search, weighted
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1))

    def train_step(self, batch):
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        return {"loss": loss, "weight": 2.0 * len(batch[0])} if self.weighted else loss

    def optimizers(self):
        return torch.optim.LBFGS(
            self.parameters(), lr=0.5, max_iter=4, history_size=5, line_search_fn=self.search
        )

    def train_data(self):
        return curve()


def by_hand(search, steps):
    task = Curve(search).double()
    optimizer, (x, y) = task.optimizers(), (t.double() for t in curve().tensors)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(task.net(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(float(optimizer.step(closure).detach()))
    return bits(task), losses


def bits(task):
    return torch.cat([p.detach().flatten() for p in task.parameters()])


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize(("size", "accumulate"), [(48, 1), (24, 2), (20, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_lbfgs_is_the_loop_by_hand(search, size, accumulate, weighted):
    task = Curve(search, weighted=weighted)
    result = quiet(
        steps=8,
        batch_size=size,
        accumulate=accumulate,
        precision="fp64",
        step=ClosureStep(),
        log_every=1,
    ).run(task)
    weights, losses = by_hand(search, 8)
    assert (bits(task) - weights).abs().max() < 1e-9
    assert [row["train/loss"] for row in result.history] == pytest.approx(losses, abs=1e-10)


def test_a_task_may_bring_the_step_and_name_the_optimizer():
    class Named(Curve):
        def optimizers(self):
            return build("lbfgs", lr=0.5, max_iter=4, history_size=5)

        def loops(self):
            return {"step": ClosureStep()}

    task = Named()
    quiet(steps=8, batch_size=48, precision="fp64").run(task)
    assert (bits(task) - by_hand(None, 8)[0]).abs().max() < 1e-9


@pytest.mark.parametrize("rng", ["counter", "stream"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_run_resumed_at_any_step_has_the_same_bits(tmp_path, search, rng):
    def part(run_dir, stop=None):
        task = Curve(search, dropout=0.2 if rng == "counter" else 0.0)
        fit = quiet(
            steps=6,
            batch_size=20,
            accumulate=2,
            rng=rng,
            step=ClosureStep(),
            run_dir=tmp_path / run_dir,
            resume="auto",
            checkpoint=Checkpoint(background=False),
        )
        fit.on("step_end", lambda run, out: run.stop("x") if run.progress.step == stop else None)
        fit.run(task)
        return bits(task)

    whole = part("whole")
    for stop in range(1, 6):
        part(str(stop), stop)
        assert torch.equal(part(str(stop)), whole)


def test_all_calls_of_a_step_drop_the_same_units():
    seen = []

    class Seen(Curve):
        def train_step(self, batch):
            hidden = self.net[:3](batch[0])
            seen.append(hidden.eq(0).detach())
            return F.mse_loss(self.net[3](hidden), batch[1])

    quiet(steps=2, batch_size=48, step=ClosureStep()).run(Seen(dropout=0.5))
    half = len(seen) // 2
    assert half > 2
    assert all(torch.equal(mask, seen[0]) for mask in seen[:half])
    assert not torch.equal(seen[0], seen[-1])


def test_schedules_events_and_clipping_belong_to_the_step():
    class Scheduled(Curve):
        def optimizers(self):
            return SGD(lr=0.1, schedule=step_decay(2, 0.5))

    norms, task, plain = [], Scheduled(), Scheduled()
    options = {"steps": 4, "batch_size": 48, "clip_norm": 0.05}
    fit = quiet(step=ClosureStep(), **options)
    fit.on("before_update", lambda run, norm: norms.append(float(norm)))
    result = fit.run(task)
    quiet(**options).run(plain)  # an optimizer that needs no closure takes the same step
    assert torch.equal(bits(task), bits(plain))
    assert len(norms) == 4
    assert result.metrics["lr"] == pytest.approx(0.05)
    assert result.metrics["train/grad_norm"] > 0.05


class Bad(Curve):
    """The loss of call number ``at`` is not finite."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.calls = at, 0

    def train_step(self, batch):
        self.calls += 1
        return super().train_step(batch) * (math.inf if self.calls == self.at else 1.0)


@pytest.mark.parametrize("at", [5, 7])  # the first call of a step, and one within it
def test_a_step_that_is_not_finite_changes_nothing(at):
    task, before = Bad(at), []
    fit = quiet(steps=5, batch_size=48, step=ClosureStep())
    fit.on("step_start", lambda run, batches: before.append(bits(task)))
    with pytest.raises(NotFiniteError, match="step 2 "):
        fit.run(task)
    assert torch.equal(bits(task), before[-1])
    skipping, whole = Bad(at), Curve()
    options = {"batch_size": 48, "precision": "fp64", "log_every": 1}
    result = quiet(steps=5, step=ClosureStep(), on_nan="skip", **options).run(skipping)
    assert sum(row.get("train/skipped_steps", 0) for row in result.history) == 1
    quiet(steps=4, step=ClosureStep(), **options).run(whole)
    assert (bits(skipping) - bits(whole)).abs().max() < 1e-9  # the batch is shuffled otherwise


def test_a_step_without_a_closure_says_what_to_pass():
    with pytest.raises(TaskError, match=r"returned LBFGS.* pass Fit\(step=ClosureStep\(\)\)"):
        quiet(steps=1).run(Curve())


def test_what_a_closure_cannot_do_is_refused():
    with pytest.raises(OptionError, match="precision='fp16' scales them"):
        quiet(steps=1, precision="fp16", step=ClosureStep()).run(Curve())

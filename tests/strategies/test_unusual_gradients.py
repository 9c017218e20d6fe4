"""Complex, sparse and float64 gradients: the numbers of a loop written by hand, in any setting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from loopkit import Checkpoint, Task
from loopkit.errors import NotFiniteError, OptionError
from loopkit.hooks import EMA
from loopkit.optim import SGD, Adagrad, AdamW
from tests.support import quiet


class Waves(Task):
    """Complex layers, and a real scale."""

    def __init__(self, optimizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.optimizer = optimizer or (lambda task: SGD(lr=0.05, momentum=0.9))
        self.net = nn.Linear(4, 3, dtype=torch.cfloat)
        self.scale = nn.Parameter(torch.ones(1))

    def train_step(self, batch):
        return ((self.net(batch[0]) * self.scale - batch[1]).abs() ** 2).mean()

    def optimizers(self):
        return self.optimizer(self)

    def train_data(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.complex(*torch.randn(2, 16, 4, generator=generator))
        return TensorDataset(x, (x[:, :3] ** 2).clone())


class Words(Waves):
    """A sparse embedding; by a module, or by torch's function."""

    def __init__(self, optimizer=None, by="module", sparse=True):
        super().__init__(optimizer)
        self.by, self.sparse = by, sparse
        self.words = nn.Embedding(10, 4, padding_idx=0, sparse=sparse and by == "module")
        self.net = nn.Linear(4, 1)

    def train_step(self, batch):
        if self.by == "module":
            words = self.words(batch[0])
        else:
            words = F.embedding(batch[0], self.words.weight, 0, sparse=self.sparse)
        return F.mse_loss(self.net(words.sum(1)) * self.scale, batch[1])

    def train_data(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randint(0, 10, (16, 3), generator=generator)
        return TensorDataset(x, torch.randn(16, 1, generator=generator))


def by_hand(task, optimizer, *, steps=4, clip=None):
    x, y = task.train_data().tensors
    made = optimizer(task.parameters())
    for _ in range(steps):
        made.zero_grad()
        task.train_step((x, y)).backward()
        if clip:
            nn.utils.clip_grad_norm_(task.parameters(), clip)
        made.step()
    return task.state_dict()


def assert_close(task, weights):
    for name, value in task.state_dict().items():
        assert (value - weights[name]).abs().max() < 1e-6, name


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2, "batch_size": 8}, {"on_nan": "skip"}, {"on_nan": "ignore"}]
)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["complex", "module", "function"])
def test_a_run_is_the_loop_by_hand(kind, clip, options):
    task = Waves() if kind == "complex" else Words(by=kind)
    dense = Waves() if kind == "complex" else Words(sparse=False)
    if kind == "function" and options.get("on_nan") == "ignore":
        task.optimizer = lambda task: SGD(lr=0.05, momentum=0.9, fused=False)
    quiet(**{"steps": 4, "batch_size": 16, "clip_norm": clip} | options).run(task)
    assert_close(task, by_hand(dense, momentum, clip=clip))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda task: AdamW(lr=0.05, weight_decay=0.0),
            lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
        ),
        (
            lambda task: torch.optim.Adam(task.parameters(), lr=0.05),
            lambda p: torch.optim.Adam(p, lr=0.05),
        ),
    ],
)
def test_complex_parameters_take_optimizers_without_a_fused_kernel(ours, theirs):
    task = Waves(ours)
    quiet(steps=4, batch_size=16).run(task)
    assert_close(task, by_hand(Waves(), theirs))


def test_sparse_gradients_take_the_optimizers_that_take_them():
    for ours, theirs in (
        (lambda task: Adagrad(lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
        (
            lambda task: {
                "words": torch.optim.SparseAdam(list(task.words.parameters()), lr=0.1),
                "rest": AdamW(lr=0.1, params="net|scale", weight_decay=0.0),
            },
            None,
        ),
    ):
        task = Words(ours)
        result = quiet(steps=4, batch_size=16, clip_norm=1.0, log_every=1).run(task)
        losses = [row["train/loss"] for row in result.history]
        assert losses[-1] < losses[0]
        if theirs:
            assert_close(task, by_hand(Words(sparse=False), theirs, clip=1.0))


@pytest.mark.parametrize("bound", [1e-3, 0.1])
def test_clip_value_bounds_the_real_and_the_imaginary_part(bound):
    task, found = Waves(), []
    fit = quiet(steps=2, batch_size=16, clip_value=bound)
    fit.on("before_update", lambda run, norm: found.append(task.net.weight.grad.clone()))
    fit.run(task)
    for gradient in found:
        assert torch.view_as_real(gradient).abs().max() <= bound * (1 + 1e-6)
    words, most = Words(), []
    fit = quiet(steps=2, batch_size=16, clip_value=bound)
    fit.on(
        "before_update",
        lambda run, norm: most.append(words.words.weight.grad.to_dense().abs().max()),
    )
    fit.run(words)
    assert max(most) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("task_class", [Waves, Words])
def test_a_value_that_is_not_finite_never_reaches_a_parameter(task_class):
    class Bad(task_class):
        def train_step(self, batch):
            loss = super().train_step(batch)
            parameter = self.net.weight
            bad = torch.where(parameter.abs() >= 0, parameter.abs(), 0.0).sum() * math.inf
            return loss + bad * 0 if self.armed else loss

        armed = False

    task = Bad()
    fit = quiet(steps=4, batch_size=16)

    @fit.on("step_start")
    def arm(run, batches):
        task.armed = run.progress.step == 2
        task.before = {name: value.clone() for name, value in task.state_dict().items()}

    with pytest.raises(NotFiniteError, match="step 3 "):
        fit.run(task)
    for name, value in task.state_dict().items():
        assert torch.equal(value, task.before[name])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 0.5},
        {"precision": "fp64"},
        {"on_nan": "skip", "accumulate": 2, "batch_size": 8},
    ],
)
def test_a_task_may_set_the_default_dtype_to_float64(options):
    torch.set_default_dtype(torch.float64)
    try:
        task, hand = Plain(), Plain()
        assert task.net.weight.dtype == torch.float64
        quiet(**{"steps": 4, "batch_size": 16} | options).run(task)
        weights = by_hand(hand, momentum, clip=options.get("clip_norm"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert max((v - weights[n]).abs().max() for n, v in task.state_dict().items()) < 1e-14


class Plain(Words):
    def __init__(self):
        super().__init__(sparse=False)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp64", torch.cdouble), ("bf16-true", torch.cfloat), ("fp16-true", torch.cfloat)],
)
def test_a_storage_dtype_leaves_complex_parameters_complex(precision, dtype):
    task = Waves()
    quiet(steps=2, batch_size=16, precision=precision).run(task)
    assert task.net.weight.dtype == dtype
    if precision == "fp64":
        assert_close(task, by_hand(Waves(), momentum, steps=2))


def test_fp16_with_complex_parameters_is_refused():
    with pytest.raises(
        OptionError, match=r"precision='fp16' with the complex parameter net\.weight"
    ):
        quiet(steps=1, precision="fp16").run(Waves())


@pytest.mark.parametrize("task_class", [Waves, Words])
def test_a_resumed_run_has_the_same_bits(task_class, tmp_path):
    def part(run_dir, stop=None):
        task = task_class()
        fit = quiet(
            epochs=3,
            batch_size=4,
            run_dir=tmp_path / run_dir,
            resume="auto",
            checkpoint=Checkpoint(background=False),
            clip_norm=1.0,
        )
        fit.on("step_end", lambda run, out: run.stop("x") if run.progress.step == stop else None)
        fit.run(task)
        return task.state_dict()

    whole = part("whole")
    part("parts", 5)
    for name, value in part("parts").items():
        assert torch.equal(value, whole[name])


def test_averages_hold_complex_parameters():
    task, found = Waves(), []
    ema = EMA(decay=0.5)
    fit = quiet(steps=3, batch_size=16, hooks=[ema], eval_every="never")
    fit.on("step_end", lambda run, out: found.append(task.net.weight.detach().clone()))
    fit.run(task)
    assert len({tuple(f.flatten().tolist()) for f in found}) == 3

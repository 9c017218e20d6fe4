"""What a task changes about itself during a run is saved, refused at once, or told at a resume."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from loopkit import Checkpoint
from loopkit.errors import CheckpointError, LoopkitWarning, TaskError
from loopkit.optim import AdamW
from tests.support import Tiny, quiet

OPTIONS = {"batch_size": 8, "steps": 8, "run_dir": "run", "eval_every": "never"}


class Classes(Tiny):
    """Trains by a loss that ``state`` is part of, which ``step`` makes of the labels."""

    def step(self, y):
        return 0.0

    def train_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x) + self.step(y), y)


def share(y):
    return F.one_hot(y, 3).float().mean(0)


class Registers(Classes):
    def step(self, y):
        if not hasattr(self, "mean"):
            self.register_buffer("mean", torch.zeros(3))
        self.mean = 0.9 * self.mean + share(y)
        return self.mean


class Fills(Classes):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def step(self, y):
        self.mean = share(y) if self.mean is None else 0.9 * self.mean + share(y)
        return self.mean


class Inside(Classes):
    """In a submodule, after some steps, of another type."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def step(self, y):
        self.calls += 1
        part = self.net[0]
        if self.calls == 3:
            part.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        if hasattr(part, "seen"):
            part.seen += F.one_hot(y, 3).sum(0)
            return part.seen / 10
        return 0.0


class Lazy(Classes):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3)
        )

    def optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trained(kind, resume=None, stop=None, steps=8):
    task, losses = kind(), []
    fit = quiet(**OPTIONS, resume=resume, checkpoint=Checkpoint(background=False))
    fit.on("step_end", lambda run, out: losses.append(float(out["loss"])))
    fit.on("step_end", lambda run, out: run.stop("") if run.progress.step == stop else None)
    fit.run(task)
    return task, losses


@pytest.mark.parametrize("kind", [Registers, Fills, Inside, Lazy])
def test_buffers_that_come_and_lazy_parameters_resume_to_the_same_bits(kind, tmp_path, monkeypatch):
    whole, losses = trained(kind)
    for stop in (2, 5):
        folder = tmp_path / str(stop)
        folder.mkdir()
        monkeypatch.chdir(folder)
        _, first = trained(kind, stop=stop)
        task, rest = trained(kind, "auto")
        assert first + rest == losses
        for one in (task, kind.load("run")):
            assert one.state_dict().keys() == whole.state_dict().keys()
            for name, value in whole.state_dict().items():
                assert torch.equal(one.state_dict()[name], value), name


def test_a_spec_that_needs_the_shapes_of_lazy_parameters_says_so():
    task = Lazy()
    task.optimizers = lambda: AdamW(lr=0.01)
    with pytest.raises(TaskError, match=r"net\.0\.weight has no shape before the first batch"):
        quiet(**OPTIONS).run(task)
    task.net(torch.zeros(2, 8))
    quiet(**OPTIONS).run(task)


def test_a_buffer_that_only_the_checkpoint_has_is_still_a_difference():
    class Other(Classes):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

    trained(Other, stop=2)
    with pytest.raises(CheckpointError, match="mean is not in the task"):
        trained(Classes, "auto")


def new(task):
    task.scale = nn.Parameter(torch.ones(3))


def replaced(task):
    task.net[0].weight = nn.Parameter(task.net[0].weight / 2)


def compiled(task):
    task.net = torch.compile(task.net, backend="eager")


def head(task):
    task.head = nn.Linear(3, 3)


CHANGES = {
    new: "Classes.scale is a new parameter",
    replaced: "Classes.net.0.weight is another parameter",
    head: "Classes.head.weight is a new parameter",
    compiled: "Classes.net._orig_mod.0.weight is a new parameter",
    lambda task: prune.l1_unstructured(
        task.net[0], "weight", 0.5
    ): "net.0.weight_orig is a new parameter",
}


@pytest.mark.parametrize("when", ["setup", "step_end"])
@pytest.mark.parametrize("change", CHANGES, ids=str.split("new replaced head compiled pruned"))
def test_a_parameter_that_comes_during_the_run_is_refused_at_once(change, when):
    fit = quiet(**OPTIONS)
    fit.on(when, lambda run, *_: change(run.task))
    task = Classes()
    with pytest.raises(TaskError, match=CHANGES[change]):
        fit.run(task)
    Classes().free = nn.Parameter(
        torch.ones(1)
    )  # other modules, and this one afterwards, may change
    task.free = nn.Parameter(torch.ones(1))


class Attributes(Classes):
    """Has plain attributes of each kind that may be state, which only some of the steps change."""

    def __init__(self, changes=""):
        super().__init__()
        self.changes = changes.split()
        self.number, self.flag, self.hidden = 0.0, False, None
        self.tensor, self.array, self.window = torch.zeros(3), np.zeros(3), deque(maxlen=3)
        self.generator, self.python = torch.Generator().manual_seed(0), random.Random(0)
        self.numpy, self.by_name = np.random.default_rng(0), {}

    def step(self, y):
        actions = {
            "number": lambda: setattr(self, "number", self.number + 1),
            "flag": lambda: setattr(self, "flag", True),
            "hidden": lambda: setattr(self, "hidden", share(y)),
            "tensor": lambda: self.tensor.add_(1),
            "array": lambda: self.array.__iadd__(1),
            "window": lambda: self.window.append(float(y[0])),
            "generator": lambda: torch.rand(1, generator=self.generator),
            "python": self.python.random,
            "numpy": self.numpy.random,
            "by_name": lambda: self.by_name.update(last=share(y)),
            "later": lambda: setattr(self, "later", 1),
        }
        for name in self.changes:
            actions[name]()
        return 0.0


ALL = "number flag hidden tensor array window generator python numpy by_name later"


@pytest.mark.parametrize("name", ALL.split())
def test_plain_attributes_that_changed_are_named_by_a_resume(name):
    trained(lambda: Attributes(name), stop=4)
    with pytest.warns(LoopkitWarning, match=rf"Attributes\.{name} changed during the saved run"):
        trained(lambda: Attributes(""), "auto", stop=6)
    # What was lost stays lost, whatever the resumed run changes.
    with pytest.warns(LoopkitWarning, match=rf"Attributes\.{name} changed during the saved run"):
        trained(lambda: Attributes(""), "auto")


@pytest.mark.filterwarnings("error::loopkit.errors.LoopkitWarning")
def test_what_does_not_change_or_is_saved_is_not_named():
    trained(Attributes, stop=4)
    trained(Attributes, "auto")

    class Saved(Attributes):
        def get_extra_state(self):
            return {"number": self.number}

        def set_extra_state(self, state):
            self.number = state["number"]

    OPTIONS["run_dir"] = "other"
    try:
        trained(lambda: Saved("number"), stop=4)
        assert trained(lambda: Saved("number"), "auto")[0].number == 8
    finally:
        OPTIONS["run_dir"] = "run"

"""A task made from a checkpoint: its constructor's arguments of every kind, its layers, its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loopkit import Task
from loopkit.errors import CheckpointError, LoopkitWarning, OptionError
from loopkit.strategies.dtensor import full_tensor
from tests.support import Tiny, digest, quiet


class Late(Tiny):
    """Makes its layers in configure_model, and counts the calls."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, self.calls = width, 0
        del self.net

    def configure_model(self) -> None:
        self.calls += 1
        self.net = nn.Sequential(nn.Linear(8, self.width), nn.ReLU(), nn.Linear(self.width, 3))


def trained(task: Task, path: Path, **options: Any) -> Task:
    quiet(steps=3, run_dir=path, checkpoint=True, eval_every="never", **options).run(task)
    return task


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_a_loaded_task_keeps_its_weights_in_whatever_follows(strategy, tmp_path):
    task = trained(Late(12), tmp_path / "run")
    fit = quiet(strategy=strategy, steps=1, eval_every="never")
    weights = digest(task.state_dict())
    expected = quiet().evaluate(task)["eval/loss"]
    loaded = Late.load(tmp_path / "run")
    assert fit.evaluate(loaded)["eval/loss"] == pytest.approx(expected, rel=1e-6)
    assert torch.is_tensor(fit.predict(loaded))
    assert fit.evaluate(loaded)["eval/loss"] == pytest.approx(expected, rel=1e-6)
    began: list[str] = []
    fit.on("fit_start", lambda run: began.append(digest(whole_state(run))))
    fit.run(loaded)
    assert loaded.calls == 1
    assert began == [weights]


def whole_state(run: Any) -> dict[str, torch.Tensor]:
    return {name: full_tensor(tensor) for name, tensor in run.strategy.model_state().items()}


def test_a_dry_run_of_layers_made_late_leaves_the_task_as_it_was(tmp_path):
    task = Late()
    quiet(dry_run=True).run(task)
    assert task.calls == 0
    assert not hasattr(task, "net")


def test_a_dry_run_leaves_buffers_attributes_and_hooks_as_they_were():
    class Remembers(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()), persistent=False)
            self.log_of_steps: list[int] = []

        def train_step(self, batch: Any) -> Any:
            self.seen += 1
            self.log_of_steps.append(1)
            return super().train_step(batch)

    from loopkit.hooks import EarlyStop

    task, hook = Remembers(), EarlyStop("eval/loss:min", patience=3)
    before = dict(vars(hook))
    quiet(dry_run=True, hooks=[hook]).run(task)
    assert float(task.seen) == 0
    assert task.log_of_steps == []
    assert vars(hook) == before


def test_a_dry_run_that_fails_leaves_the_task_as_it_was():
    class Fails(Tiny):
        def eval_step(self, batch: Any) -> Any:
            raise ZeroDivisionError

    task = Fails()
    before = digest(task.state_dict())
    with pytest.raises(ZeroDivisionError):
        quiet(dry_run=True).run(task)
    assert digest(task.state_dict()) == before


def test_a_task_that_cannot_be_copied_is_refused_by_a_dry_run():
    task = Tiny()
    task.stream = (n for n in range(3))
    with pytest.raises(OptionError, match=r"dry_run=True trains a copy .* cannot pickle"):
        quiet(dry_run=True).run(task)


class Many(Tiny):
    def __init__(self, first: int, /, second: int = 2, *rest: int, last: str = "z", **more: Any):
        super().__init__()
        self.got = (first, second, rest, last, more)


class Pile(Tiny):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1,), {}),
        ((1, 5), {}),
        ((1, 5, 6, 7), {"last": "a", "other": 3}),
        ((1,), {"second": 9, "deep": {"a": [1, 2]}}),
    ],
)
def test_arguments_of_every_kind_come_back(args, kwargs, tmp_path):
    task = trained(Many(*args, **kwargs), tmp_path)
    assert Many.load(tmp_path).got == task.got
    assert Many.load(tmp_path, last="new").got[3] == "new"


@pytest.mark.parametrize("sizes", [(), (3,), (3, 4, 5)])
def test_variadic_arguments_alone_come_back(sizes, tmp_path):
    trained(Pile(*sizes), tmp_path)
    assert Pile.load(tmp_path).sizes == sizes


class Grown(Tiny):
    """Tiny as it is after a change: another head, one more layer, an argument less."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net[3] = nn.Linear(16, 5)
        self.extra = nn.Linear(2, 2)


def test_a_changed_class_takes_what_fits_and_says_what_does_not(tmp_path):
    task = trained(Tiny(), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"extra.weight is missing.*net.3.weight has shape.*strict=False"
    ):
        Grown.load(tmp_path)
    with pytest.warns(LoopkitWarning, match="the rest is loaded"):
        loaded = Grown.load(tmp_path, strict=False)
    assert torch.equal(loaded.net[0].weight, task.net[0].weight)
    assert loaded.net[3].weight.shape == (5, 16)


def test_an_argument_that_is_gone_is_named(tmp_path):
    trained(Late(12), tmp_path)

    class Later(Late):
        def __init__(self) -> None:
            super().__init__(12)

    with pytest.raises(CheckpointError, match=r"argument\(s\) width, which Later does not take"):
        Later.load(tmp_path)
    with pytest.warns(LoopkitWarning, match="width"):
        assert Later.load(tmp_path, strict=False).width == 12

"""FusedStep: torch's own fused step to the bit, and torch's own wherever something is out of the
ordinary.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from loopkit.errors import OptionError
from loopkit.optim import AdamW
from loopkit.optim.fused import FusedStep, step_function
from tests.support import Tiny, digest, quiet

KINDS = [torch.optim.AdamW, torch.optim.Adam]


def made(
    kind: type, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)).to(dtype)
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": weights, "weight_decay": 0.1, "lr": 0.02},
        {"params": rest, "weight_decay": 0.0},
    ]
    return model, kind(groups, lr=0.01, fused=True, **options)


def fill(model: nn.Module, step: int, missing: int | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(model.parameters()):
        p.grad = None if i == missing else torch.randn(p.shape, generator=generator).to(p.dtype)


def same(one: tuple, other: tuple) -> None:
    assert digest(one[0].state_dict()) == digest(other[0].state_dict())
    mine, theirs = (optimizer.state_dict() for _, optimizer in (one, other))
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, held in theirs["state"].items():
        assert mine["state"][key].keys() == held.keys()
        for name, tensor in held.items():
            assert mine["state"][key][name].dtype == tensor.dtype
            assert torch.equal(mine["state"][key][name], tensor), f"{name} of {key}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"betas": (0.5, 0.9), "eps": 1e-3}])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_torch(kind, options, dtype):
    mine, theirs = made(kind, dtype, **options), made(kind, dtype, **options)
    step = step_function(mine[1])
    assert isinstance(step, FusedStep)
    for number in range(12):
        for model, optimizer in (mine, theirs):
            fill(model, number)
            optimizer.param_groups[0]["lr"] = 0.02 / (number + 1)
        step()
        theirs[1].step()
        same(mine, theirs)


def test_a_parameter_without_gradient_is_left_alone():
    mine, theirs = made(KINDS[0]), made(KINDS[0])
    step = step_function(mine[1])
    for number, missing in enumerate([0, 0, None, None, 3, None, None]):
        for model, _ in (mine, theirs):
            fill(model, number, missing)
        step()
        theirs[1].step()
        same(mine, theirs)


def test_loaded_and_replaced_state_is_used():
    mine, theirs = made(KINDS[0]), made(KINDS[0])
    step = step_function(mine[1])
    saved = None
    for number in range(8):
        for model, optimizer in (mine, theirs):
            fill(model, number)
            if number == 5:
                optimizer.load_state_dict(copy.deepcopy(saved))
            if number == 6:  # one parameter begins again
                held = optimizer.state[next(model.parameters())]
                held |= {name: torch.zeros_like(tensor) for name, tensor in held.items()}
        step()
        theirs[1].step()
        same(mine, theirs)
        if number == 2:
            saved = copy.deepcopy(theirs[1].state_dict())


@pytest.mark.parametrize("where", ["optimizer", "everywhere"])
def test_hooks_run(where):
    model, optimizer = made(KINDS[0])
    step, calls = step_function(optimizer), []

    def note(*_: Any) -> None:
        calls.append(1)

    handle = (
        optimizer.register_step_pre_hook(note)
        if where == "optimizer"
        else register_optimizer_step_post_hook(note)
    )
    for number in range(3):
        fill(model, number)
        step()
    handle.remove()
    step()
    assert len(calls) == 3


@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"fused": False}, {"lr": torch.tensor(0.1)}]
)
def test_what_is_unusual_is_left_to_torch(options):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), **({"fused": True} | options))
    fill(model, 0)
    before = digest(model.state_dict())
    step = step_function(optimizer)
    step()
    assert not isinstance(step, FusedStep)
    assert digest(model.state_dict()) != before


def test_other_classes_and_wrapped_steps_are_left_to_torch():
    class Mine(torch.optim.AdamW):
        pass

    model = nn.Linear(2, 2)
    assert not isinstance(step_function(Mine(model.parameters(), fused=True)), FusedStep)
    assert not isinstance(
        step_function(torch.optim.SGD(model.parameters(), lr=0.1, fused=True)), FusedStep
    )
    scheduled = torch.optim.AdamW(model.parameters(), fused=True)
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1.0)
    assert not isinstance(step_function(scheduled), FusedStep)


def test_a_run_steps_through_it_and_ends_as_with_torch(monkeypatch):
    def run(own: bool) -> str:
        calls = []
        with monkeypatch.context() as patch:
            plain = FusedStep.__call__
            if own:
                patch.setattr(FusedStep, "__call__", lambda self: (calls.append(1), plain(self))[1])
            else:
                patch.setattr(FusedStep, "__call__", lambda self: self.optimizer.step())
            task = Tiny()
            task.optimizers = lambda: AdamW(lr=1e-2, weight_decay=0.1)
            quiet(epochs=2, batch_size=8, clip_norm=1.0).run(task)
        assert len(calls) == (16 if own else 0)
        return digest(task.state_dict())

    assert run(own=True) == run(own=False)


def test_a_kernel_with_other_arguments_is_left_to_torch(monkeypatch):
    from loopkit.optim import fused

    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    assert isinstance(fused.step_function(optimizer), fused.FusedStep)
    monkeypatch.setattr(fused, "_ARGUMENTS", (*fused._ARGUMENTS, "another"))
    assert not isinstance(fused.step_function(optimizer), fused.FusedStep)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_may_begin_later_than_others(fused, nesterov):
    """Each of three parameters has its first gradient at another step, and misses one later."""

    def trained(step, parameters, optimizer):
        for number in range(8):
            for index, parameter in enumerate(parameters):
                begins = number >= 2 * index and number != 6 - index
                parameter.grad = torch.full((5,), 0.1 * (number + index)) if begins else None
            step(optimizer)
        return [parameter.detach().clone() for parameter in parameters]

    def made(**options):
        parameters = [torch.nn.Parameter(torch.ones(5) * i) for i in range(3)]
        optimizer = torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01, **options
        )
        return parameters, optimizer

    parameters, optimizer = made(fused=fused)
    step = step_function(optimizer)
    ours = trained(lambda o: step(), parameters, optimizer)
    theirs = trained(lambda o: o.step(), *made(foreach=False))
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_a_fused_dampening_that_begins_later_is_refused():
    parameters = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    step = step_function(optimizer)
    parameters[0].grad = torch.ones(5)
    step()
    parameters[1].grad = torch.ones(5)
    with pytest.raises(OptionError, match=r"pass SGD\(fused=False\)"):
        step()

"""A strategy is a description until it is set up, and may be set up again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from loopkit import DDP, FSDP, DeepSpeed, SingleDevice, TensorParallel
from loopkit.errors import OptionError
from loopkit.strategies.base import ComputeSettings, Strategy
from loopkit.strategies.device_map import DeviceMapStrategy
from tests.support import Tiny, points

PLAN = TensorParallel({"net.0": "colwise"})
MADE = {
    "single": lambda: SingleDevice("cpu"),
    "device_map": lambda: DeviceMapStrategy({"": "cpu"}),
    "ddp": lambda: DDP("cpu", compress="bf16"),
    "fsdp": lambda: FSDP("cpu", tensor=PLAN),
    "deepspeed": lambda: DeepSpeed(stage=3, accelerator="cpu"),
}
ATTRIBUTES = sorted(set(Strategy.__annotations__) - set(vars(Strategy)) - {"finish_step"})


@pytest.mark.parametrize("strategy", MADE)
def test_what_is_not_known_yet_is_an_error_that_says_what_to_call(strategy):
    made = MADE[strategy]()
    assert "device" in ATTRIBUTES
    assert "world" in ATTRIBUTES
    for name in ATTRIBUTES:
        with pytest.raises(
            AttributeError, match=rf"\.{name} is unknown until setup_environment\(\)"
        ):
            getattr(made, name)
    with pytest.raises(AttributeError, match="has no attribute 'devize'"):
        made.devize  # noqa: B018


@pytest.mark.parametrize("strategy", MADE)
def test_a_description_copies_and_tears_down_before_it_is_set_up(strategy):
    made = MADE[strategy]()
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert vars(twin).keys() == vars(made).keys()
        twin.teardown(failed=True)


@pytest.mark.parametrize("strategy", ["single", "device_map", "ddp"])
def test_a_strategy_serves_one_run_after_another(strategy):
    made, ends = MADE[strategy](), []
    for clip_norm in (None, 0.05, None):
        task = Tiny(dropout=0.0)
        made.setup_environment(ComputeSettings(clip_norm=clip_norm))
        assert made.optimizers == {}
        made.setup_module(task)
        made.setup_optimizers({"main": torch.optim.SGD(task.parameters(), lr=0.1)})
        made.backward(made.step_fn("train_step")(points(8)[:]))
        made.finalize_gradients()
        made.optimizer_step()
        assert not made.finish_step()
        made.teardown()
        ends.append(task.net[0].weight.detach().clone())
    assert torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[1])


def test_a_device_that_is_not_there_is_refused_by_the_description():
    with pytest.raises(OptionError, match="accelerator='tpu' is not known"):
        SingleDevice("tpu")

"""Activation checkpointing saves memory and changes no bit; compile compiles once, keeps names."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loopkit import Compile
from loopkit.errors import OptionError
from tests import fork_server
from tests.support import Tiny, digest, points, quiet


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 64), nn.Linear(64, 8), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(x))))


class Deep(Tiny):
    """Twelve residual blocks with dropout; counts the bytes saved for the backward pass of a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.saved = 0

    def train_step(self, batch: Any) -> torch.Tensor:
        seen: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                self.saved += tensor.numel() * tensor.element_size()
            return tensor

        self.saved = 0
        x, y = batch
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.net(x), y)


def trained(**options: Any) -> tuple[Deep, str]:
    task = Deep()
    quiet(epochs=1, batch_size=20, eval_every="never", **options).run(task)
    return task, digest(task.state_dict())


@pytest.mark.parametrize(
    ("activation_checkpointing", "most"),
    [
        ("full", 0.2),
        ("every:2", 0.65),
        (r"select:blocks\.([0-9])$", 0.4),
        ("class:Block", 0.2),
    ],
)
@pytest.mark.parametrize("rng", ["counter", "stream"])
def test_activation_checkpointing_saves_memory_on_a_12_layer_model_and_changes_no_bit(
    activation_checkpointing, most, rng
):
    plain, before = trained(rng=rng)
    lean, after = trained(rng=rng, activation_checkpointing=activation_checkpointing)
    assert after == before
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert lean.saved < most * plain.saved


def test_offload_changes_no_bit():
    assert (
        trained(activation_checkpointing="offload")[1]
        == trained()[1]
        == trained(activation_checkpointing="full+offload")[1]
    )


def test_the_next_run_replaces_the_choice():
    task = Deep()
    sizes = []
    for activation_checkpointing in ("full", None, "every:3", "full"):
        quiet(steps=1, eval_every="never", activation_checkpointing=activation_checkpointing).run(
            task
        )
        sizes.append(task.saved)
    assert sizes[0] == sizes[3] < sizes[2] < sizes[1]


def test_a_models_own_checkpointing_is_asked_for():
    class Own(nn.Linear):
        asked = None

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            self.asked = gradient_checkpointing_kwargs

    task = Tiny()
    task.net[0] = Own(8, 16)
    quiet(steps=1, activation_checkpointing="full").run(task)
    assert task.net[0].asked == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("activation_checkpointing", "text"),
    [
        ("some", "is not known: give 'full', 'every:2'"),
        ("every:0", "at least 1 after 'every:'"),
        ("full:2", "is not known"),
        ("select:(", "no regular expression"),
        ("full+every:2", "is not known"),
    ],
)
def test_a_bad_activation_checkpointing_is_named(activation_checkpointing, text):
    with pytest.raises(OptionError, match=text):
        quiet(activation_checkpointing=activation_checkpointing)


def test_an_activation_checkpointing_that_picks_nothing_lists_what_there_is():
    with pytest.raises(OptionError, match=r"picks no module of Tiny, which has: net, net\.0"):
        quiet(activation_checkpointing="select:attention").run(Tiny())


class Blocks(Tiny):
    """Tiny behind three residual blocks."""

    def __init__(self, **hparams: Any) -> None:
        super().__init__(**hparams)
        torch.manual_seed(0)
        self.net = nn.Sequential(*(Block() for _ in range(3)), *self.net)
        for block in self.net[:3]:
            block.drop.p = 0.0


@pytest.mark.parametrize("scope", ["step", "blocks"])
def test_compile_compiles_nothing_again_for_ragged_batches_or_evaluation(scope):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    task = Blocks(count=30, dropout=0.0)
    task.eval_data = lambda: points(23, seed=2)
    after_first_epoch = []
    fit = quiet(epochs=3, batch_size=8, compile=Compile(backend=backend, scope=scope))
    fit.on("epoch_end", lambda run: after_first_epoch.append(len(compiled)))
    fit.run(task)
    assert compiled
    if scope == "step":
        assert len(compiled) == 2, "train_step and eval_step, once each"
        assert sum(counters["recompiles"].values()) == 0
    assert after_first_epoch[1] == after_first_epoch[2] == len(compiled)


def test_compile_changes_no_parameter_name_and_no_number_beyond_rounding():
    plain = Blocks(dropout=0.0)
    quiet(epochs=1).run(plain)
    for scope in ("step", "blocks"):
        task = Blocks(dropout=0.0)
        quiet(epochs=1, compile=Compile(backend="aot_eager", scope=scope)).run(task)
        assert list(task.state_dict()) == list(plain.state_dict())
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(task.state_dict()[name], tensor)


def test_without_a_compiler_it_says_so_and_continues():
    code = """
import warnings
import torch._inductor.config
from tests.support import Tiny, quiet

torch._inductor.config.force_disable_caches = True
warnings.simplefilter("always")
quiet(steps=2, compile=True, eval_every="never").run(Tiny())
print("done")
"""
    environment = {"PATH": "/nonexistent", "CXX": "/nonexistent/g++", "HOME": "/tmp"}
    done = fork_server.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert done.stdout.strip() == "done", done.stderr
    assert "continues without compiling; install a C++ compiler" in done.stderr


def test_blocks_of_torchs_own_classes_alone_are_refused():
    with pytest.raises(
        OptionError, match="no repeated block of a class of its own; pass scope='step'"
    ):
        quiet(compile=Compile(scope="blocks")).run(Tiny())

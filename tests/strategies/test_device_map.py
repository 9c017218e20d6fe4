"""device_map on one device: the device of each module, moves between devices, refused options.

Where only the device of a tensor matters, "meta" is the second device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loopkit import SingleDevice, Task
from loopkit.errors import OptionError
from loopkit.optim import SGD
from loopkit.strategies.device_map import DeviceMapStrategy
from loopkit.strategies.device_placement import balanced, by_hand, connect, divide
from tests.support import Recorder, Tiny, digest, points, quiet

CPU, META = torch.device("cpu"), torch.device("meta")
# Tests only name these.
GPUS = [torch.device("cuda", index) for index in range(4)]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return x if scale is None else x * scale


class Inner(nn.Module):
    """A model whose blocks may be on several devices."""

    def __init__(self, depth: int = 6, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 8)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Deep(Task):
    def __init__(self, depth: int = 6, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Inner(depth, tied)
        self.out = nn.Linear(8, 3)

    def train_step(self, batch: Any) -> Any:
        return F.cross_entropy(self.out(self.model(batch[0])), batch[1])

    def eval_step(self, batch: Any) -> Any:
        return {"loss": self.train_step(batch)}

    def optimizers(self) -> Any:
        return SGD(lr=0.1)

    def train_data(self) -> Any:
        return points(60)

    def eval_data(self) -> Any:
        return points(20)


def size(module: nn.Module) -> int:
    return sum(p.numel() * 4 for p in module.parameters())


@pytest.mark.parametrize(
    "device_map", ["auto", {"": "cpu"}, {"net": "cpu"}, {"net.0": "cpu", "net.3": "cpu:0"}]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "bf16-true"},
        {"clip_norm": 0.05, "accumulate": 2},
        {"clip_value": 1e-3},
        {"on_nan": "ignore"},
        {"activation_checkpointing": "select:net"},
    ],
)
def test_on_one_device_every_bit_is_that_of_a_run_without_it(device_map, options):
    found = []
    for given in ({}, {"device_map": device_map}):
        task, trail = Tiny(), Recorder()
        quiet(epochs=2, batch_size=8, hooks=[trail], **given, **options).run(task)
        found.append((trail.losses, digest(task.state_dict())))
    assert len(found[0][0]) > 5
    assert found[0] == found[1]


def test_a_resumed_run_is_the_whole_run(tmp_path):
    whole = Tiny()
    quiet(steps=12, batch_size=8, device_map={"": "cpu"}).run(whole)
    for steps in (5, 12):
        task = Tiny()
        fit = quiet(
            steps=12,
            batch_size=8,
            device_map={"": "cpu"},
            run_dir=tmp_path,
            checkpoint=True,
            resume="auto",
        )
        fit.on(
            "step_end",
            lambda run, out, last=steps: run.stop("half") if run.progress.step == last else None,
        )
        fit.run(task)
    assert digest(task.state_dict()) == digest(whole.state_dict())


def test_evaluation_and_predictions_take_the_map_too():
    task = Tiny()
    plain = quiet().evaluate(task)["eval/loss"]
    assert quiet(device_map={"net": "cpu"}).evaluate(task)["eval/loss"] == plain
    assert torch.equal(quiet(device_map="auto").predict(task), quiet().predict(task))


@pytest.mark.parametrize(
    "sizes", [[1] * 12, [5, 1, 1, 1, 1, 1], [1, 1, 1, 9], [3, 0, 0, 3], [7], list(range(1, 20))]
)
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_are_consecutive_and_even_within_one_size(sizes, parts):
    chosen = divide(sizes, parts)
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(parts))
    loads = [sum(s for s, part in zip(sizes, chosen) if part == each) for each in range(parts)]
    assert max(loads) <= sum(sizes) / parts + max(sizes)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_auto_balances_bytes_and_leaves_blocks_whole(count):
    task = Deep(depth=12)
    places = balanced(task, GPUS[:count])
    held = {name for name, module in task.named_modules() if list(module.parameters(recurse=False))}
    assert set(places) == held
    loads = dict.fromkeys(GPUS[:count], 0)
    for name, device in places.items():
        loads[device] += sum(
            p.numel() * 4 for p in task.get_submodule(name).parameters(recurse=False)
        )
    assert max(loads.values()) - min(loads.values()) <= 2 * size(task.model.blocks[0])
    for number in range(12):
        assert (
            len({places[name] for name in places if name.startswith(f"model.blocks.{number}.")})
            == 1
        )
    order = [places[name].index for name in places]
    assert order == sorted(order)


def test_auto_keeps_what_is_shared_together_and_what_it_cannot_divide_whole():
    places = balanced(Deep(tied=True), GPUS[:2])
    assert places["model.embed"] == places["model.head"] == GPUS[0]
    assert places["model.blocks.5.up"] == GPUS[1]

    class Whole(Deep):
        def __init__(self) -> None:
            super().__init__()
            self.model = Block()

    assert (
        len(
            {
                places
                for name, places in balanced(Whole(), GPUS[:2]).items()
                if name.startswith("model.")
            }
        )
        == 1
    )


def test_by_hand_the_longest_prefix_counts():
    task = Deep()
    places = by_hand(task, {"": CPU, "model.blocks": GPUS[0], "model.blocks.1": GPUS[1]}, CPU)
    assert places["model.embed"] == places["out"] == CPU
    assert places["model.blocks.0.up"] == places["model.blocks.5.norm"] == GPUS[0]
    assert places["model.blocks.1.up"] == GPUS[1]


def test_the_start_of_a_name_may_be_left_out_where_one_module_fits():
    task = Deep()
    whole = by_hand(task, {"": CPU, "model.blocks": GPUS[0], "model.blocks.1": GPUS[1]}, CPU)
    assert by_hand(task, {"": CPU, "blocks": GPUS[0], "blocks.1": GPUS[1]}, CPU) == whole
    with pytest.raises(
        OptionError, match=r"'norm', and Deep has several: model\.blocks\.0\.norm, "
    ):
        by_hand(task, {"": CPU, "norm": GPUS[0]}, CPU)


def test_inputs_come_to_the_layer_and_outputs_back_to_the_task():
    """No tensor comes back from meta, so all that follows the blocks is there, and the outputs too."""
    task, seen = Deep(), {}
    for part in (task.model.blocks, task.model.head):
        part.to("meta")
    places = by_hand(task, {"": CPU, "model.blocks": META, "model.head": META}, CPU)
    for name, module in task.named_modules():
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: seen.update(
                {name: (args[0].device, out.device)}
            ),
            with_kwargs=True,
        )
    handles = connect(task, places, META)
    assert task.model(torch.ones(2, 8)).device == META
    assert task.out(torch.ones(2, 8)).device == META
    assert (seen["model.embed"], seen["out"]) == ((CPU, CPU), (CPU, CPU))
    assert seen["model.blocks.0"] == seen["model.blocks.5"] == (META, META)
    scaled = task.model.blocks[0](torch.ones(2, 8), scale=torch.ones(8))
    assert scaled.device == META
    for handle in handles:
        handle.remove()
    assert not any(m._forward_pre_hooks for m in task.modules())
    with pytest.raises(RuntimeError, match="meta"):
        task.model.blocks[0](torch.ones(2, 8))


def test_what_a_layer_returns_keeps_its_class():
    class Output(dict):
        """As transformers' outputs are: items are attributes too."""

        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, value)
            setattr(self, key, value)

    class Returning(nn.Module):
        def forward(self, x: torch.Tensor) -> Output:
            out = Output()
            out["logits"], out["loss"] = x, None
            return out

    task = Deep()
    task.model = Returning()
    connect(task, {"out": META}, META)
    found = task.model(torch.ones(2))
    assert type(found) is Output
    assert found.logits.device == found["logits"].device == META


def test_hooks_are_gone_when_the_run_is_over():
    strategy = DeviceMapStrategy({"": "cpu"})
    strategy._handles = connect(task := Deep(), {"out": CPU, "model.embed": META}, CPU)
    assert any(m._forward_pre_hooks for m in task.modules())
    strategy.teardown()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in task.modules())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_a_strategy_of_several_processes_is_refused_with_the_reason(strategy):
    with pytest.raises(
        OptionError,
        match=f"device_map and strategy='{strategy}' exclude each other: .* one process, and",
    ):
        quiet(device_map="auto", strategy=strategy).run(Tiny())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"device_map": {"net": "meta"}},
            "gives 'net' 'meta', where parameters have no values: they can be neither trained",
        ),
        ({"device_map": {"net": "disk"}}, "gives 'net' 'disk', where parameters have no values"),
        (
            {"device_map": {"net": "cuda:99"}},
            "'cuda:99', which is not on this machine: it has 1 cpu",
        ),
        ({"device_map": {"net": 99}}, "gives 'net' 99, which is not on this machine"),
        ({"device_map": {"net": "gpu"}}, "'gpu', which is no device: give 'cpu', 'cuda:0'"),
        (
            {"device_map": "balanced"},
            "device_map='balanced': give 'auto', or the device of each part",
        ),
        ({"device_map": {}}, "device_map={}: give 'auto'"),
        (
            {"device_map": {"ent": "cpu"}},
            r"names 'ent', and Tiny has no module of that name\. Did you mean 'net'\?",
        ),
        (
            {"device_map": {"net.0": "cpu"}},
            r"says nothing of net\.3, which holds parameters: name it, or give '' a device",
        ),
        (
            {"device_map": "auto", "strategy": SingleDevice("cpu")},
            "chooses the strategy, and strategy='SingleDevice' is given",
        ),
        ({"device_map": "auto", "nodes": 2}, "one machine's devices, and nodes=2 is given"),
        ({"device_map": "auto", "devices": 64}, "devices=64: layers can be spread over"),
        (
            {"device_map": {"": "cpu"}, "devices": 2},
            "device_map names the devices, and devices=2 is given",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_reason(options, text):
    with pytest.raises(OptionError, match=text):
        quiet(**options).run(Tiny())


def test_a_parameter_without_values_is_refused_by_name():
    task = Tiny()
    task.net[3].to("meta")
    with pytest.raises(OptionError, match=r"net\.3\.weight is on meta and has no values to move"):
        quiet(device_map="auto").run(task)


def test_a_shared_parameter_with_two_devices_is_refused():
    with pytest.raises(
        OptionError, match=r"puts model\.embed on cpu and model\.head on cuda:0, and they share"
    ):
        by_hand(Deep(tied=True), {"": CPU, "model.head": GPUS[0]}, CPU)


def test_the_command_line_takes_a_map_and_a_run_writes_it_down(tmp_path):
    import json

    from loopkit.cli.args.config import fit_parameters, read_values
    from loopkit.cli.args.option_table import OptionTable
    from loopkit.cli.args.tokens import read_tokens

    for typed, value in (
        ("auto", "auto"),
        ("{net: cpu, '': 'cuda:0'}", {"net": "cpu", "": "cuda:0"}),
    ):
        table = OptionTable(fit_parameters(), {})
        tokens = read_tokens(["--device-map", typed])
        assert read_values(table, tokens, []).fit["device_map"] == value
    quiet(steps=1, device_map={"net": "cpu"}, run_dir=tmp_path, loggers="jsonl").run(Tiny())
    assert json.loads((tmp_path / "hparams.json").read_text())["options"]["device_map"] == {
        "net": "cpu"
    }

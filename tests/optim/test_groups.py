"""Groups: what decays, which rate each layer and each name has, read off real parameters after real
steps.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loopkit import Task
from loopkit.errors import OptionError
from loopkit.optim import SGD, AdamW, Muon, ParamGroup, group_table
from loopkit.optim.layers import hidden_matrices, layer_levels
from tests.support import Tiny, quiet


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


class Transformer(Task):
    """A model with embeddings, blocks, a last norm and a head, the head registered early."""

    def __init__(self, choice=None, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.choice = choice
        self.head = nn.Linear(8, 3)
        self.position = nn.Parameter(torch.randn(4, 8))
        self.token = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(blocks))
        self.final_norm = nn.LayerNorm(8)

    def optimizers(self):
        return self.choice

    def train_step(self, batch):
        return sum(
            (p * 0.0).sum() for p in self.parameters()
        )  # a gradient of zero for every parameter

    def train_data(self):
        return [torch.zeros(1)] * 3


def rates(spec, task=None):
    task = task or Transformer()
    names = {id(p): name for name, p in task.named_parameters()}
    return {
        names[id(p)]: group["lr"]
        for group in spec.build(task).param_groups
        for p in group["params"]
    }


def test_each_layer_has_the_rate_of_the_one_above_times_the_decay():
    found = rates(AdamW(lr=1.0, layer_decay=0.5))
    assert len(found) == len(list(Transformer().parameters()))
    assert found["head.weight"] == found["head.bias"] == found["final_norm.weight"] == 1.0
    for index, rate in enumerate((0.125, 0.25, 0.5)):
        assert found[f"blocks.{index}.norm.bias"] == found[f"blocks.{index}.mlp.2.weight"] == rate
    assert found["token.weight"] == found["position"] == 0.0625


def test_layer_rates_are_what_the_parameters_move_by():
    class Moving(Transformer):
        def train_step(self, batch):
            return sum(p.sum() for p in self.parameters())  # a gradient of one for every element

    task = Moving(SGD(lr=1.0, layer_decay=0.5))
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    quiet(steps=1).run(task)
    for name, rate in rates(SGD(lr=1.0, layer_decay=0.5)).items():
        assert torch.allclose(
            before[name] - task.get_parameter(name), torch.tensor(rate), atol=1e-6
        ), name


class ResNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        self.between = nn.BatchNorm2d(4)
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "levels"),
    [
        (
            ResNetLike(),
            {
                "stem.weight": 0,
                "layer1.0.weight": 1,
                "layer1.1.bias": 2,
                "between.weight": 2,
                "layer2.0.weight": 3,
                "layer2.1.weight": 4,
                "classifier.0.weight": 5,
                "classifier.2.bias": 5,
            },
        ),
        (Tiny(), {"net.0.weight": 0, "net.3.bias": 1}),
        (
            nn.Sequential(nn.Embedding(5, 8), nn.Sequential(Block(8), Block(8)), nn.Linear(8, 2)),
            {"0.weight": 0, "1.0.norm.weight": 1, "1.1.mlp.0.bias": 2, "2.weight": 3},
        ),
    ],
    ids=["resnet", "sequential", "wrapped"],
)
def test_layers_are_found_in_any_model(model, levels):
    found = layer_levels(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {name: found[name] for name in levels} == levels
    assert sorted(set(found.values())) == list(range(max(levels.values()) + 1))


def test_a_model_without_layers_is_refused():
    with pytest.raises(
        OptionError, match="Linear has no ModuleList or Sequential to tell its layers by"
    ):
        layer_levels(nn.Linear(2, 2))


def test_biases_and_norms_do_not_shrink_under_a_zero_gradient():
    task = Transformer(AdamW(lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    quiet(epochs=1, log_every="never").run(task)
    for name, p in task.named_parameters():
        shrunk = (1 - 0.1 * 0.5) ** 3 if p.ndim == 2 else 1.0
        assert torch.allclose(p, before[name] * shrunk, rtol=1e-5), name


def test_a_group_has_its_own_rate_and_decay_and_the_first_match_wins():
    groups = [
        ParamGroup(r"^head", lr=0.3, weight_decay=0.5),
        ParamGroup("norm", weight_decay=0.2),
        ParamGroup("head|blocks", lr=0.2),
    ]
    task = Transformer(SGD(lr=0.1, weight_decay=0.0, groups=groups))
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    quiet(steps=1).run(task)
    for name, p in task.named_parameters():
        shrunk = 1 - 0.3 * 0.5 if "head" in name else 1 - 0.1 * 0.2 if "norm" in name else 1.0
        assert torch.allclose(p, before[name] * shrunk, rtol=1e-6), name
    found = rates(task.choice)
    assert found["blocks.0.mlp.0.weight"] == 0.2
    assert found["blocks.0.norm.weight"] == found["token.weight"] == 0.1


def test_a_groups_rate_stands_beside_layer_decay():
    found = rates(
        AdamW(
            lr=1.0,
            layer_decay=0.5,
            groups=[ParamGroup("token", lr=0.7), ParamGroup("position", weight_decay=0.1)],
        )
    )
    assert (found["token.weight"], found["position"], found["blocks.2.norm.bias"]) == (
        0.7,
        0.0625,
        0.5,
    )


def test_a_group_may_set_other_options():
    spec = AdamW(lr=1e-3, groups=[ParamGroup("token", options={"betas": (0.5, 0.6)})])
    betas = {group["name"]: group["betas"] for group in spec.build(Transformer()).param_groups}
    assert betas == {"token": (0.5, 0.6), "decay": (0.9, 0.999), "no_decay": (0.9, 0.999)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: AdamW(groups=[ParamGroup("head"), ParamGroup("head.bias")]).build(
                Transformer()
            ),
            r"ParamGroup\(match='head.bias'\) is the first to match no",
        ),
        (lambda: ParamGroup("(", lr=1.0), r"ParamGroup\(match='\('\) is no regular expression"),
        (
            lambda: ParamGroup("x", lr=-1),
            r"ParamGroup\(match='x', lr=-1\): give a number of at least 0",
        ),
        (lambda: AdamW(groups=["head"]), r"AdamW\(groups=...\): give a sequence of ParamGroup"),
        (
            lambda: AdamW(layer_decay=1.5),
            r"AdamW\(layer_decay=1.5\): give a number above 0 and of at most 1",
        ),
        (lambda: AdamW(no_decay=["["]), r"AdamW\(no_decay='\['\) is no regular expression"),
    ],
)
def test_a_bad_group_is_an_error_that_names_it(make, said):
    with pytest.raises(OptionError, match=said):
        make()


def test_hidden_matrices_are_those_between_embeddings_and_head():
    hidden = hidden_matrices(Transformer())
    assert hidden == {f"blocks.{i}.mlp.{j}.weight" for i in range(3) for j in (0, 2)} | {"position"}


def test_the_last_matrix_is_the_head_where_none_is_called_so():
    assert hidden_matrices(Tiny()) == {"net.0.weight"}


def test_a_head_tied_to_the_embedding_is_no_hidden_matrix():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.blocks, self.out = (
                nn.Embedding(9, 8),
                nn.ModuleList([Block(8)]),
                nn.Linear(8, 9, bias=False),
            )
            self.out.weight = self.wte.weight

    assert hidden_matrices(Tied()) == {"blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight"}


def test_the_table_shows_every_group():
    task = Transformer(
        AdamW(lr=1e-3, weight_decay=0.1, layer_decay=0.5, groups=[ParamGroup("head", lr=0.01)]),
        blocks=1,
    )
    task.token.requires_grad_(False)
    assert (
        group_table(task)
        == """\
group             parameters  elements       lr  weight decay
head                       1        24     0.01           0.1
head/no_decay              1         3     0.01             0
layer_2/no_decay           2        16    0.001             0
layer_1                    2       128   0.0005           0.1
layer_1/no_decay           4        32   0.0005             0
layer_0                    1        32  0.00025           0.1
trainable                 11       235
frozen                     1        80"""
    )


def test_the_table_of_several_optimizers_names_them():
    table = group_table(
        Tiny(), {name: spec.build(Tiny()) for name, spec in Muon().items()}
    ).splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["muon:", "adamw:", "adamw:"]
    torch_made = torch.optim.SGD(Tiny().parameters(), lr=0.5)
    assert group_table(Tiny(), torch_made).splitlines()[1].split() == [
        "group",
        "0",
        "4",
        "195",
        "0.5",
        "0",
    ]

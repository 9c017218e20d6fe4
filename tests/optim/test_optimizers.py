"""Optimizers: each by its name, against its formula, and resumed bit for bit from a checkpoint in
mid-run.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loopkit import Checkpoint, Task
from loopkit.errors import MissingExtraError, OptionError
from loopkit.foreign_names import OPTIMIZER_NAMES
from loopkit.optim import (
    SGD,
    Adagrad,
    AdamW,
    AdamW8bit,
    AdamWBf16,
    Lion,
    Muon,
    OptimizerSpec,
    ScheduleFree,
    build,
    cosine,
)
from loopkit.optim.factory import OPTIMIZERS
from loopkit.optim.kahan import KahanAdamW
from tests.support import Recorder, Tiny, digest, quiet

NAMES = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop, "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam,
    "adamw_bf16": KahanAdamW, "torch.optim.Adamax": torch.optim.Adamax, "torch.optim.ASGD": torch.optim.ASGD,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_by_name_is_that_class_at_that_rate(name):
    optimizer = build(name, lr=0.02, weight_decay=0.1).build(Tiny())
    assert type(optimizer) is NAMES[name]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.02, 0.1),
        (0.02, 0.0),
    ]


def test_what_is_not_given_is_the_classs_own():
    spec = build("torch.optim.AdamW")
    assert (spec.lr, spec.weight_decay) == (1e-3, 0.01)
    assert (
        build("torch.optim.NAdam", momentum_decay=0.01)
        .build(Tiny())
        .param_groups[0]["momentum_decay"]
        == 0.01
    )


@pytest.mark.parametrize(
    "spec", [AdamW(), SGD(0.1), Adagrad(), build("adam"), OptimizerSpec(torch.optim.AdamW, 1e-3)]
)
def test_fused_is_the_default_and_can_be_left(spec):
    assert all(group["fused"] is True for group in spec.build(Tiny()).param_groups)
    left = build(
        {"SGD": "sgd"}.get(spec.optimizer.__name__, spec.optimizer.__name__.lower()),
        lr=0.1,
        fused=False,
    )
    assert left.build(Tiny()).param_groups[0]["fused"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad"])
def test_16_bit_parameters_move_by_the_optimizers_formula(name, dtype):
    """torch's fused SGD on the CPU once left most of them where they were."""
    task, single = Tiny().to(dtype), Tiny().to(dtype)
    ours = build(name, lr=0.1).build(task)
    plain = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adagrad": torch.optim.Adagrad}[
        name
    ]
    theirs = plain(single.parameters(), lr=0.1, foreach=False)
    for mine, other in zip(task.parameters(), single.parameters()):
        mine.grad = torch.linspace(1, 2, mine.numel(), dtype=dtype).view_as(mine)
        other.grad = mine.grad.clone()
    before = [p.detach().clone() for p in task.parameters()]
    ours.step()
    theirs.step()
    for mine, other, old in zip(task.parameters(), single.parameters(), before):
        assert not torch.equal(mine, old)
        torch.testing.assert_close(mine, other, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_a_trainer_name_gets_ours(name):
    with pytest.raises(OptionError, match=f"no optimizer {name!r}: here that is") as caught:
        build(name, lr=1e-3)
    ours = str(caught.value).split("here that is '")[1].split("'")[0]
    if "bit" not in ours:  # what is in 8 bits takes a package that may not be there
        build(ours, lr=1e-3)
    else:
        assert ours in OPTIMIZERS or ours.startswith("bitsandbytes.optim.")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: build("admw"),
            "no optimizer 'admw'. Did you mean 'adamw'.* Give one of adamw, adam, sgd",
        ),
        (lambda: build("torch.optim.Nadam"), "there is no optimizer 'torch.optim.Nadam'"),
        (lambda: build("no.such.Thing"), "'no.such.Thing' cannot be imported"),
        (lambda: build("torch.nn.Linear"), "torch.nn.Linear is not a torch.optim.Optimizer"),
        (
            lambda: AdamW(wieght_decay=0.1),
            "AdamW has no option 'wieght_decay'. Did you mean 'weight_decay'",
        ),
        (lambda: build("rmsprop", fused=True), "RMSprop has no option 'fused'"),
        (
            lambda: build("torch.optim.Rprop", weight_decay=0.1),
            r"Rprop\(weight_decay=0.1\): this optimizer has no weight decay",
        ),
        (lambda: AdamW(lr=-1), r"AdamW\(lr=-1\): give a number of at least 0"),
        (lambda: AdamW(weight_decay="much"), r"AdamW\(weight_decay='much'\): give a number"),
        (
            lambda: AdamW(betas=(2.0, 0.9)).build(Tiny()),
            "AdamW cannot be built: Invalid beta parameter",
        ),
        (
            lambda: Lion(betas=(2.0, 0.9)).build(Tiny()),
            r"Lion cannot be built: .*betas are in \[0, 1\)",
        ),
        (
            lambda: Muon(wieght_decay=0.1),
            "Muon has no option 'wieght_decay'. Did you mean 'weight_decay'",
        ),
        (
            lambda: Muon(params="bias")["muon"].build(Tiny()),
            r"Muon\(params='hidden'\) picks no trainable parameter of Tiny",
        ),
    ],
)
def test_a_bad_value_is_an_error_that_names_it(make, said):
    with pytest.raises(OptionError, match=said):
        make()


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [(AdamW8bit, "bitsandbytes", "quant"), (ScheduleFree, "schedulefree", "schedulefree")],
)
def test_a_missing_package_is_an_error_with_the_remedy(make, package, extra, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, f"{package}.optim", None)
    with pytest.raises(
        MissingExtraError, match=rf"'{package}': pip install 'loopkit-torch\[{extra}\]'"
    ):
        make()


def test_lion_is_its_formula():
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))
    expected, momentum = weight.detach().clone(), torch.zeros(5, 4, dtype=torch.float64)
    task = nn.Module()
    task.weight = weight
    optimizer = Lion(lr=0.01, betas=(0.9, 0.97), weight_decay=0.3).build(task)
    for _ in range(20):
        grad = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        weight.grad = grad.clone()
        optimizer.step()
        # Chen et al. 2023, algorithm 2
        update = torch.sign(0.9 * momentum + 0.1 * grad)
        expected = expected - 0.01 * (update + 0.3 * expected)
        momentum = 0.97 * momentum + 0.03 * grad
        assert torch.allclose(weight, expected, atol=1e-14, rtol=0)


def follow(optimizer_class, dtype, steps=400):
    """Where an optimizer takes 64 weights, near 1, by gradients that call for updates of a
    ten-thousandth each.
    """
    generator = torch.Generator().manual_seed(5)
    weight = nn.Parameter(torch.ones(64).to(dtype))
    optimizer = optimizer_class([weight], lr=1e-4, weight_decay=0.1)
    for _ in range(steps):
        weight.grad = (1.0 + 0.5 * torch.randn(64, generator=generator)).to(dtype)
        optimizer.step()
    return weight.detach().float()


def test_kahan_keeps_the_updates_that_bf16_loses():
    exact = follow(torch.optim.AdamW, torch.float32)
    assert (exact < 0.97).all()
    assert (follow(torch.optim.AdamW, torch.bfloat16) == 1.0).all()
    error = (follow(KahanAdamW, torch.bfloat16) - exact).abs().max()
    assert error < 2**-8, (
        error
    )  # half a unit in the last place of bf16 below 1, and what the moments round


def test_adamw_bf16_is_the_one_with_kahan_summation():
    assert AdamWBf16(lr=0.1).optimizer is KahanAdamW


def test_kahan_adamw_in_fp32_is_adamw_but_for_the_first_moments_rounding():
    assert torch.allclose(
        follow(KahanAdamW, torch.float32), follow(torch.optim.AdamW, torch.float32), atol=2e-4
    )


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    task = Tiny()
    task.optimizers = lambda: Muon(lr=0.01, schedule=cosine())
    held, rates = {}, []
    fit = quiet(epochs=4)

    @fit.on("step_end")
    def look(run, out):
        held.update(
            {
                name: {id(p) for g in o.param_groups for p in g["params"]}
                for name, o in run.optimizers.items()
            }
        )
        rates.append([o.param_groups[0]["lr"] for o in run.optimizers.values()])

    before = fit.evaluate(task)["eval/loss"]
    fit.run(task)
    assert held["muon"] == {id(task.net[0].weight)}
    assert held["adamw"] == {id(p) for p in task.parameters()} - held["muon"]
    assert all(one == other for one, other in rates)
    assert rates[-1] < rates[0]
    assert fit.evaluate(task)["eval/loss"] < before


def test_several_optimizers_under_one_name_are_told_apart():
    task = Tiny()
    task.extra = nn.Linear(2, 2)
    task.optimizers = lambda: {"net": Muon(params="^net"), "extra": SGD(0.1, params=task.extra)}
    task.train_step = lambda batch: (
        Tiny.train_step(task, batch) + task.extra(batch[0][:, :2]).square().mean()
    )
    held = {}
    fit = quiet(steps=1)
    fit.on(
        "step_end",
        lambda run, out: held.update({n: len(o.state) for n, o in run.optimizers.items()}),
    )
    fit.run(task)
    assert list(held) == ["net_muon", "net_adamw", "extra"]
    assert (held["net_muon"], held["net_adamw"]) == (1, 3)


class Chosen(Tiny):
    """Tiny under the optimizer called so."""

    def __init__(self, name, **options) -> None:
        super().__init__()
        self.name, self.choices = name, options
        wide = {"adamw_8bit", "lion_8bit"}  # whose state is in 8 bits from 4096 elements on
        if name in wide:
            self.net[0] = nn.Linear(8, 512)
            self.net[3] = nn.Linear(512, 3)

    def optimizers(self):
        return build(self.name, schedule=cosine(warmup=2), **self.choices)


def resumed_and_whole(make, tmp_path, **options):
    """(weights, optimizer state and losses) of a run of 12 steps, whole, and stopped and resumed at
    1, 5 and 9.
    """

    def run(where, stops):
        recorder, state = Recorder(), {}
        for stop in [*stops, None]:
            fit = quiet(
                epochs=3,
                batch_size=8,
                accumulate=2,
                run_dir=tmp_path / where,
                resume="auto",
                hooks=[recorder],
                checkpoint=Checkpoint(every="1000 steps", background=False),
                eval_every="2 steps",
                **options,
            )

            @fit.on("step_end")
            def look(r, out, stop=stop):
                if r.progress.step == stop:
                    r.stop("test")
                if r.progress.step == 12:
                    tensors, plain = r.strategy.optimizer_state()
                    state["optimizer"] = digest(tensors), plain

            task = make()
            fit.run(task)
        return digest(task.state_dict()), state["optimizer"], recorder.losses

    return run("parts", [1, 5, 9]), run("whole", [])


CASES = [
    "adamw",
    "adam",
    "sgd",
    "adafactor",
    "adagrad",
    "rmsprop",
    "nadam",
    "radam",
    "muon",
    "lion",
    "adamw_bf16",
]


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_whole_run(name, tmp_path):
    parts, whole = resumed_and_whole(lambda: Chosen(name, lr=0.01), tmp_path)
    assert len(whole[2]) == 12
    assert parts == whole


def test_kahan_adamw_resumes_with_its_own_dtypes_in_bf16(tmp_path):
    parts, whole = resumed_and_whole(
        lambda: Chosen("adamw_bf16", lr=0.01), tmp_path, precision="bf16-true"
    )
    assert parts == whole


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.9}])
def test_the_loss_falls_under_every_optimizer(options):
    for name in CASES:
        task = Chosen(name, lr=0.1 if name in ("sgd", "radam") else 0.01, **options)
        fit = quiet(epochs=6, batch_size=4)
        before = fit.evaluate(task)["eval/loss"]
        assert fit.run(task).metrics["eval/loss"] < 0.9 * before, name


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_eight_bit_state_is_kept_and_resumed(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    task = Chosen(name, lr=0.01)
    dtypes = set()
    fit = quiet(steps=1)
    fit.on(
        "step_end",
        lambda run, out: dtypes.update(
            s["state1"].dtype for s in run.optimizers["main"].state.values()
        ),
    )
    fit.run(task)
    assert torch.uint8 in dtypes
    parts, whole = resumed_and_whole(lambda: Chosen(name, lr=0.01), tmp_path)
    assert parts == whole


class Averaged(torch.optim.SGD):
    """SGD that gives the mean of its first weights and its present ones, in the way of
    schedule-free optimizers.
    """

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.first = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}
        self.training = False

    @torch.no_grad()
    def eval(self):
        for p, first in self.first.items() if self.training else ():
            p.lerp_(first, 0.5)
        self.training = False

    @torch.no_grad()
    def train(self):
        for p, first in self.first.items() if not self.training else ():
            p.copy_(2 * p - first)
        self.training = True

    def step(self, closure=None):
        assert self.training
        return super().step(closure)


class TwoWeights(Task):
    """One weight, falling by one in each step, evaluated as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0]))

    def train_step(self, batch):
        return self.weight.sum()

    def eval_step(self, batch):
        return {"loss": self.weight.sum()}

    def optimizers(self):
        return Averaged(self.parameters(), lr=1.0)

    def train_data(self):
        return [torch.zeros(1)] * 4

    eval_data = train_data


def test_an_optimizer_with_two_sets_of_weights_is_evaluated_and_saved_with_its_averages(tmp_path):
    task = TwoWeights()
    result = quiet(run_dir=tmp_path, eval_every=1, checkpoint=True).run(task)
    assert [row["eval/loss"] for row in result.history if "eval/loss" in row] == [
        -0.5,
        -1.0,
        -1.5,
        -2.0,
    ]
    assert task.weight.item() == -2.0
    assert TwoWeights.load(result.checkpoint).weight.item() == -2.0


def test_schedule_free_weights_leave_no_trace_of_being_looked_at(tmp_path):
    pytest.importorskip("schedulefree")

    class Free(Tiny):
        def optimizers(self):
            return ScheduleFree(lr=0.01, warmup_steps=3)

    looked = quiet(epochs=3, batch_size=8, eval_every=1)
    rarely = quiet(epochs=3, batch_size=8, eval_every="never")
    one, other = Free(), Free()
    looked.run(one)
    rarely.run(other)
    assert digest(one.state_dict()) == digest(other.state_dict())
    parts, whole = resumed_and_whole(Free, tmp_path)
    assert parts == whole


def test_adafactor_by_the_trainers_rules_is_transformers_own_and_resumes(tmp_path):
    kind = pytest.importorskip("transformers.optimization").Adafactor
    rules = {"lr": 1e-2, "scale_parameter": False, "relative_step": False}

    class Ruled(Tiny):
        def optimizers(self):
            return build("transformers.optimization.Adafactor", no_decay=(), **rules)

    def part(run_dir, stop=None):
        task = Ruled(dropout=0.0)
        options = {"run_dir": tmp_path / run_dir, "checkpoint": True, "resume": "auto"}
        fit = quiet(epochs=2, batch_size=60, eval_every="never", **options)
        fit.on("step_end", lambda run, out: run.stop("x") if run.progress.step == stop else None)
        fit.run(task)
        return task

    whole, hand = part("whole"), Tiny(dropout=0.0)
    part("parts", 1)
    assert digest(part("parts").state_dict()) == digest(whole.state_dict())
    optimizer, batch = kind(hand.parameters(), **rules), hand.train_data().tensors
    for _ in range(2):
        optimizer.zero_grad()
        hand.train_step(batch).backward()
        optimizer.step()
    for mine, theirs in zip(whole.parameters(), hand.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)

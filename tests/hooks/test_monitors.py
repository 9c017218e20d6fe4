"""LRMonitor, GradMonitor and Throughput."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loopkit import Compile, Hook, StepLoop
from loopkit.errors import LoopkitWarning, OptionError
from loopkit.hooks import GradMonitor, LRMonitor, Throughput
from loopkit.optim import SGD, linear
from tests.hooks.runs import check_resume, weights
from tests.support import Tiny, digest, points, quiet


class Scheduled(Tiny):
    def optimizers(self):
        groups = [
            {"params": self.net[0].parameters()},
            {"params": self.net[3].parameters(), "lr": 0.5, "name": "head"},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.1)
        return optimizer, {"scheduler": scheduler, "interval": "step"}


class Pair(Tiny):
    def optimizers(self):
        return {
            "body": SGD(0.1, params=self.net[0], schedule=linear()),
            "head": SGD(0.5, params=self.net[3]),
        }


def test_the_rates_of_all_groups_are_logged_as_they_are_at_each_log():
    result = quiet(steps=8, batch_size=8, log_every=4, eval_every="never", hooks=[LRMonitor()]).run(
        Scheduled()
    )
    rows = {row["step"]: row for row in result.history}
    assert {step: (row["lr/0"], row["lr/head"]) for step, row in rows.items()} == {
        1: (0.1, 0.5),
        4: pytest.approx((0.01, 0.05)),
        8: pytest.approx((0.001, 0.005)),
    }


def test_several_optimizers_have_their_names_in_front():
    result = quiet(steps=4, batch_size=8, log_every=2, eval_every="never", hooks=[LRMonitor()]).run(
        Pair()
    )
    assert (
        result.history[-1]["lr/body/all"]
        == result.history[-1]["lr/body"]
        == pytest.approx(0.1 * 1 / 4)
    )
    assert result.history[-1]["lr/head/all"] == 0.5


def test_the_end_of_an_epoch_of_unknown_length_logs_the_rates_too():
    class Unsized(Pair):
        def train_data(self):
            return (points(48)[start : start + 8] for start in range(0, 48, 8))

        def optimizers(self):
            return SGD(0.1)

    result = quiet(epochs=1, log_every="1 epoch", eval_every="never", hooks=[LRMonitor()]).run(
        Unsized()
    )
    assert [(row["step"], row["lr/all"]) for row in result.history] == [(1, 0.1), (6, 0.1)]


class Watch(Hook):
    """Norms and update ratios by hand, at one step."""

    def __init__(self, at):
        self.at, self.found = at, {}

    def on_before_update(self, run, grad_norm):
        if run.progress.step + 1 == self.at:
            layers = {"net.0": run.task.net[0], "net.3": run.task.net[3]}
            for name, layer in layers.items():
                grads = torch.cat([p.grad.flatten() for p in layer.parameters()])
                self.found[f"grad_norm/{name}"] = float(grads.norm())
            self.before = weights(run.task)

    def on_step_end(self, run, out):
        if run.progress.step == self.at:
            after = weights(run.task)
            for layer in ("net.0", "net.3"):
                old = torch.cat(
                    [v.flatten() for n, v in self.before.items() if n.startswith(layer)]
                )
                new = torch.cat([v.flatten() for n, v in after.items() if n.startswith(layer)])
                self.found[f"update_ratio/{layer}"] = float((new - old).norm() / old.norm())


def test_gradient_norms_and_update_ratios_per_layer():
    watch = Watch(6)
    result = quiet(
        steps=7,
        batch_size=8,
        log_every=7,
        eval_every="never",
        clip_norm=0.5,
        accumulate=2,
        hooks=[watch, GradMonitor(every=6)],
    ).run(Tiny())
    row = result.history[-1]
    assert len(watch.found) == 4
    for name, value in watch.found.items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
    both = sum(row[f"grad_norm/{layer}"] ** 2 for layer in ("net.0", "net.3")) ** 0.5
    assert both <= 0.5 + 1e-5


def test_all_as_one_is_the_norm_of_everything():
    result = quiet(
        steps=3, batch_size=8, log_every=3, eval_every="never", hooks=[GradMonitor(3, "all")]
    ).run(Tiny())
    row = result.history[-1]
    assert row["grad_norm/all"] == pytest.approx(row["train/grad_norm"], rel=1e-5)
    assert 0 < row["update_ratio/all"] < 1


def test_each_optimizer_that_steps_alone_is_seen():
    class Alternating(StepLoop):
        def run(self, run, batches):
            for name in ("body", "head"):
                out = self.backward(run, batches, optimizers=[name])
                self.update(run, [name])
            return out

    result = quiet(
        steps=2,
        batch_size=8,
        log_every=2,
        eval_every="never",
        step=Alternating(),
        hooks=[GradMonitor(2)],
    ).run(Pair())
    assert {
        "grad_norm/net.0",
        "grad_norm/net.3",
        "update_ratio/net.0",
        "update_ratio/net.3",
    } <= result.history[-1].keys()


@pytest.mark.parametrize("make", [LRMonitor, lambda: GradMonitor(every=4)])
def test_monitors_change_nothing_and_resume_exactly(make, tmp_path):
    whole = check_resume(make, tmp_path, (3, 6), accumulate=2)
    plain = check_resume(Hook, tmp_path / "plain", (), accumulate=2)
    assert whole["weights"] == plain["weights"]


class Tokens(Tiny):
    """A batch of token ids [8, 5] through an embedding, attention and a linear layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([nn.Embedding(11, 16), nn.Linear(16, 11)])

    def train_step(self, batch):
        hidden = self.net[0](batch["input_ids"])[:, None]
        hidden = F.scaled_dot_product_attention(hidden, hidden, hidden)[:, 0]
        return F.cross_entropy(self.net[1](hidden).flatten(0, 1), batch["input_ids"].flatten())

    def train_data(self):
        return [{"input_ids": torch.arange(40).reshape(8, 5) % 11} for _ in range(12)]


class Ticks:
    """A clock that shows half a second more at each look."""

    now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


def test_rates_are_counts_over_the_time_between_logs():
    result = quiet(
        steps=12, log_every=4, eval_every="never", hooks=[Throughput(clock=Ticks())]
    ).run(Tokens())
    rows = {row["step"]: row for row in result.history}
    assert "train/samples_per_second" not in rows[1]  # the first stretch is over at the first log
    assert rows[4]["train/samples_per_second"] == 3 * 8 / 0.5
    assert rows[8]["train/samples_per_second"] == 4 * 8 / 0.5
    assert rows[8]["train/tokens_per_second"] == 4 * 40 / 0.5


def test_time_in_evaluations_is_left_out():
    class Slow(Tokens):
        def on_eval_end(self, run, metrics):
            clock.now += 100.0

        def eval_step(self, batch):
            return {"loss": self.train_step(batch)}

        def eval_data(self):
            return self.train_data()[:1]

    clock = Ticks()
    result = quiet(steps=12, log_every=4, eval_every=4, hooks=[Throughput(clock=clock)]).run(Slow())
    rows = {row["step"]: row for row in result.history if "train/loss" in row}
    assert rows[8]["train/samples_per_second"] == 4 * 8 / (
        0.5 + 0.5
    )  # up to the evaluation, and after it


def test_operations_are_those_counted_by_hand_forward_and_backward():
    monitor = Throughput(peak_flops=1e6, clock=Ticks())
    result = quiet(
        steps=12, log_every=4, eval_every="never", accumulate=2, epochs=2, hooks=[monitor]
    ).run(Tokens())
    linear = (
        2 * 40 * 16 * 11
    )  # per pass; the backward makes two, one for the input and one for the weight
    attention = 2 * (2 * 8 * 5 * 5 * 16)  # queries by keys, and weights by values
    per_micro_batch = (
        3 * linear + attention + 5 * attention // 2
    )  # its backward makes five products, one of them a second time
    assert monitor.flops_per_step == 2 * per_micro_batch
    row = result.history[-1]
    assert row["train/flops_per_second"] == pytest.approx(4 * 2 * per_micro_batch / 0.5)
    assert row["train/mfu"] == pytest.approx(row["train/flops_per_second"] / 1e6)


def test_counting_changes_nothing():
    plain, counted = Tiny(), Tiny()
    quiet(steps=6, batch_size=8).run(plain)
    quiet(steps=6, batch_size=8, hooks=[Throughput(flops=True)]).run(counted)
    assert digest(plain.state_dict()) == digest(counted.state_dict())


def test_a_first_step_that_raises_ends_the_count():
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    class Broken(Tiny):
        def train_step(self, batch):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quiet(steps=1, hooks=[Throughput(flops=True)]).run(Broken())
    assert _get_current_dispatch_mode() is None


def test_compiled_code_is_said_to_be_out_of_sight():
    with pytest.warns(LoopkitWarning, match="cannot see into compiled code"):
        quiet(
            steps=1,
            compile=Compile(backend="eager"),
            eval_every="never",
            hooks=[Throughput(flops=True)],
        ).run(Tiny())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GradMonitor(every="now"), "every=.*'now'"),
        (lambda: GradMonitor("3 min"), "every='3 min'"),
        (lambda: GradMonitor(per="tensor"), "per='tensor'"),
        (lambda: Throughput(peak_flops=0), "peak_flops=0"),
    ],
)
def test_bad_arguments_are_named(make, named):
    with pytest.raises(OptionError, match=named):
        make()

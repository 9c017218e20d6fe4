"""Every precision trains, and each does what its name says."""

from __future__ import annotations

import pytest
import torch

from tests.support import Tiny, quiet

NAMES = ["fp32", "tf32", "bf16", "fp16", "bf16-true", "fp16-true", "fp64"]


class Looks(Tiny):
    """Tiny that notes the dtypes it meets."""

    def train_step(self, batch):
        x, _ = batch
        out = self.net(x)
        self.met = (self.net[0].weight.dtype, x.dtype, out.dtype, torch.zeros(1).dtype)
        return super().train_step(batch)


@pytest.mark.parametrize(
    ("precision", "weights", "inputs", "outputs", "created"),
    [
        ("fp32", torch.float32, torch.float32, torch.float32, torch.float32),
        ("bf16", torch.float32, torch.float32, torch.bfloat16, torch.float32),
        ("fp16", torch.float32, torch.float32, torch.float16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("fp16-true", torch.float16, torch.float16, torch.float16, torch.float16),
        ("fp64", torch.float64, torch.float64, torch.float64, torch.float64),
    ],
)
def test_dtypes(precision, weights, inputs, outputs, created):
    task = Looks()
    result = quiet(precision=precision, epochs=1).run(task)
    assert task.met == (weights, inputs, outputs, created)
    assert torch.get_default_dtype() is torch.float32
    assert result.metrics["eval/loss"] > 0


def set_to():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("before", [("highest", True), ("medium", False)])
def test_tf32_is_set_for_the_length_of_a_run(before):
    class Sees(Tiny):
        def train_step(self, batch):
            self.met = set_to()
            return super().train_step(batch)

        def eval_step(self, batch):
            self.measured = set_to()
            return super().eval_step(batch)

    try:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        task = Sees()
        quiet(precision="tf32").run(task)
        assert (task.met, task.measured, set_to()) == (("high", True), ("high", True), before)
        quiet().run(task)
        assert (task.met, task.measured) == (before, before)
        quiet(precision="tf32").evaluate(task)
        assert (task.measured, set_to()) == (("high", True), before)
        with pytest.raises(ZeroDivisionError):
            fit = quiet(precision="tf32")
            fit.on("step_end", lambda run, out: 1 / 0)
            fit.run(task)
        assert set_to() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16-true", "fp64"])
def test_it_learns(precision):
    result = quiet(
        precision=precision, epochs=60, batch_size=20, eval_every="60 epochs", eval_first=True
    ).run(Tiny(dropout=0.0, lr=0.03))
    evals = [row["eval/loss"] for row in result.history if "eval/loss" in row]
    assert evals[-1] < 0.7 * evals[0]


@pytest.mark.parametrize("precision", NAMES)
def test_resume_is_identical_in_every_precision(precision, tmp_path):
    from loopkit import Checkpoint
    from tests.support import digest

    options = {
        "precision": precision,
        "epochs": 3,
        "batch_size": 10,
        "checkpoint": Checkpoint(background=False),
    }
    whole, first, rest = Tiny(), Tiny(), Tiny()
    quiet(run_dir=tmp_path / "a", **options).run(whole)
    fit = quiet(run_dir=tmp_path / "b", **options)
    fit.on("step_end", lambda run, out: run.stop("test") if run.progress.step == 7 else None)
    fit.run(first)
    quiet(run_dir=tmp_path / "b", resume="auto", **options).run(rest)
    assert digest(rest.state_dict()) == digest(whole.state_dict()) != digest(first.state_dict())


def test_the_scaler_skips_an_overflow_and_lowers_its_scale():
    scales, weights = [], []

    class Overflows(Tiny):
        def train_step(self, batch):
            loss = super().train_step(batch)
            return loss * (1e38 if len(scales) == 2 else 1.0)

    task = Overflows(dropout=0.0)
    fit = quiet(precision="fp16", batch_size=10, on_nan="raise", eval_every="never")

    @fit.on("step_end")
    def note(run, out):
        scales.append(run.strategy.scaler.state_dict()["scale"])
        weights.append(task.net[0].weight.detach().clone())

    fit.run(task)
    assert scales[2] == scales[1] / 2
    assert torch.equal(weights[2], weights[1])
    assert not torch.equal(weights[3], weights[2])


def test_a_nan_loss_under_a_scaler_is_raised_too():
    from loopkit.errors import NotFiniteError

    class Poisoned(Tiny):
        seen = 0

        def train_step(self, batch):
            self.seen += 1
            return super().train_step(batch) * (float("nan") if self.seen == 3 else 1.0)

    with pytest.raises(NotFiniteError, match=r"step 3 \(epoch 0\): the loss is nan"):
        quiet(precision="fp16", batch_size=10, eval_every="never").run(Poisoned())


def test_clip_value_bounds_every_element():
    largest = []
    fit = quiet(batch_size=10, clip_value=1e-3, eval_every="never")
    fit.on(
        "before_update",
        lambda run, norm: largest.append(
            max(float(p.grad.abs().max()) for p in run.task.parameters())
        ),
    )
    fit.run(Tiny())
    assert all(value == pytest.approx(1e-3) for value in largest)

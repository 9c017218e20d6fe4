"""The tasks of ``tasks/``, each trained for real, small: they learn, and resume to the same bits."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loopkit import Checkpoint, Task
from loopkit.errors import DataError, NotFiniteError
from loopkit.optim import SGD
from tasks.charlm import CharLM, fingerprint, main
from tasks.digits import Digits
from tasks.gan import POINTS, RingGan
from tasks.sam import NoisyDigits, SamStep
from tests import fork_server
from tests.support import digest, points, quiet

ROOT = Path(__file__).parents[2]


def made(name: str, folder: Path) -> Task:
    torch.manual_seed(0)
    return {
        "charlm": lambda: CharLM(layers=1, width=16, context=16, folder=str(folder)),
        "digits": Digits,
        "gan": lambda: RingGan(hidden=8),
        "sam": NoisyDigits,
    }[name]()


@pytest.fixture
def folder(tmp_path):
    """Twenty small files of Python."""
    (tmp_path / "code").mkdir()
    for i in range(20):
        (tmp_path / "code" / f"{i:02}.py").write_text(
            f"def f{i}(x):\n    return x + {i}\n\n\n" * 41
        )
    return tmp_path / "code"


@pytest.mark.parametrize("name", ["charlm", "digits", "gan", "sam"])
def test_stopped_and_resumed_is_bit_identical(name, tmp_path, folder):
    def run(run_dir: Path, stop_at: int | None = None) -> tuple[str, int]:
        task = made(name, folder)
        fit = quiet(
            steps=12,
            batch_size=8,
            accumulate=2,
            clip_norm=0.5,
            eval_every=5,
            run_dir=run_dir,
            resume="auto",
            checkpoint=Checkpoint(every="1000 steps"),
            limit_eval=2,
        )
        if stop_at is not None:
            fit.on(
                "step_end", lambda r, out: r.stop("test") if r.progress.step == stop_at else None
            )
        step = fit.run(task).step
        return digest(task.state_dict()), step

    whole, _ = run(tmp_path / "whole")
    assert whole != digest(made(name, folder).state_dict())
    for stop in (1, 7):
        assert run(tmp_path / str(stop), stop)[1] == stop
        assert run(tmp_path / str(stop)) == (whole, 12)


@pytest.mark.parametrize("name", ["charlm", "digits", "gan", "sam"])
def test_a_batch_in_two_parts_trains_alike(name, folder):
    """Accumulation gives custom steps the gradient of the whole batch, up to rounding."""
    ends = []
    for parts in (1, 2):
        task = made(name, folder).double()
        if isinstance(task, RingGan):  # its noise is drawn for each micro-batch
            task.make = lambda count, generator=task.generator: generator(
                torch.ones(count, 8).double()
            )
        quiet(
            steps=3,
            global_batch_size=16,
            batch_size=16 // parts,
            precision="fp64",
            eval_every="never",
        ).run(task)
        ends.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-10)


def test_digits_learns_and_predicts():
    torch.manual_seed(0)
    task = Digits()
    fit = quiet(epochs=10, eval_every="10 epochs")
    metrics = fit.run(task).metrics
    labels = task.eval_data().tensors[1]
    predicted = fit.predict(task)
    assert metrics["eval/accuracy"] > 0.93
    assert (predicted == labels).double().mean().item() == pytest.approx(
        metrics["eval/accuracy"], abs=1e-6
    )


def test_gan_updates_each_player_by_its_own_loss_alone():
    """One step equals the hand-written one: critic first, then the generator against the new
    critic.
    """
    task = made("gan", Path())
    task.make = lambda count: task.generator(torch.linspace(-1, 1, count * 8).view(count, 8))
    mine = made("gan", Path())
    mine.load_state_dict(task.state_dict())
    mine.make = lambda count: mine.generator(torch.linspace(-1, 1, count * 8).view(count, 8))
    task.optimizers = lambda: {p: SGD(lr=0.1, params=f"^{p}") for p in ("critic", "generator")}
    data = task.train_data()
    task.train_data = lambda: [(data[:32][0],)]
    quiet(steps=1, eval_every="never").run(task)
    for player, loss in (("critic", mine.critic_step), ("generator", mine.generator_step)):
        parameters = list(getattr(mine, player).parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss((data[:32][0],)), parameters)):
            p.data -= 0.1 * g
    for (name, p), q in zip(task.named_parameters(), mine.parameters()):
        torch.testing.assert_close(p, q, msg=lambda m, n=name: f"{n}: {m}")
    assert task.critic[0].weight.requires_grad


def test_gan_learns_the_ring():
    torch.manual_seed(0)
    metrics = quiet(epochs=6, batch_size=128, eval_every="6 epochs").run(RingGan()).metrics
    assert metrics["eval/points"] == 8
    assert metrics["eval/near"] > 0.7  # 0.99 of the data, 0.38 of the bare ring


def test_gan_measures_what_it_says():
    def measure(preds: torch.Tensor) -> dict[str, float]:
        return RingGan().compute_metrics(type("Outputs", (), {"preds": preds.numpy()}))

    assert measure(POINTS) == {"points": 8, "near": 1.0}
    assert measure(torch.cat([POINTS[:2], torch.zeros(2, 2)])) == {"points": 2, "near": 0.5}


class Valley(Task):
    """One weight matrix under SAM, for a comparison with the formula."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def train_step(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def optimizers(self) -> Any:
        return SGD(lr=0.1)

    def train_data(self) -> Any:
        return [points(64)[:]]


def test_sam_takes_the_gradient_at_the_worst_place_nearby():
    torch.manual_seed(0)
    task = Valley()
    w = [p.detach().clone().requires_grad_() for p in task.parameters()]
    x, y = points(64)[:]

    def grads(at):
        return torch.autograd.grad(F.cross_entropy(F.linear(x, *at), y), at)

    g = grads(w)
    norm = math.sqrt(sum(float(t.square().sum()) for t in g))
    there = [(p + 0.3 * t / norm).detach().requires_grad_() for p, t in zip(w, g)]
    expected = [p - 0.1 * t for p, t in zip(w, grads(there))]
    result = quiet(steps=1, step=SamStep(0.3)).run(task)
    for p, e in zip(task.parameters(), expected):
        torch.testing.assert_close(p, e)
    assert result.metrics["train/loss"] == pytest.approx(
        F.cross_entropy(F.linear(x, *there), y).item()
    )


def test_sam_survives_wrong_labels_better():
    accuracy = []
    for rho in (0.0, 0.2):
        torch.manual_seed(0)
        accuracy.append(
            quiet(epochs=40, eval_every="40 epochs")
            .run(NoisyDigits(rho=rho))
            .metrics["eval/accuracy"]
        )
    assert accuracy[1] > accuracy[0]
    assert accuracy[0] > 0.8


@pytest.mark.parametrize("name", ["gan", "sam"])
def test_a_custom_step_never_uses_what_is_not_finite(name, folder):
    task = made(name, folder)
    good, bad = task.train_data()[:64], tuple(t.clone() for t in task.train_data()[64:128])
    bad[0][0] = math.nan
    task.train_data = lambda: [good, bad, good]
    with pytest.raises(NotFiniteError, match="step 2"):
        quiet(eval_every="never").run(task)
    assert all(p.isfinite().all() for p in task.parameters())


def test_charlm_learns(folder):
    task = CharLM(layers=1, width=32, context=16, lr=1e-2, folder=str(folder))
    result = quiet(steps=200, batch_size=16, eval_first=True, eval_every="never").run(task)
    losses = [row["eval/loss"] for row in result.history if "eval/loss" in row]
    losses.append(quiet().evaluate(task)["eval/loss"])
    assert losses[0] == pytest.approx(math.log(128), abs=0.1)
    assert losses[-1] < 2.0  # the letters' frequencies alone give 2.7
    assert task.write("def ", 20) == task.write("def ", 20)
    assert task.write("def ", 20).startswith("def ")


def test_charlm_holds_every_tenth_file_out(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.py").write_text(chr(65 + i) * 100)
    task = CharLM(context=10, folder=str(tmp_path))
    seen, held = (
        set(data.tensors[0].flatten().tolist()) - {10}
        for data in (task.train_data(), task.eval_data())
    )
    assert held == {65 + 9, 65 + 19}
    assert seen == set(range(65, 85)) - held


def test_charlm_says_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(DataError, match="holds too little Python: 0 "):
        CharLM(folder=str(tmp_path)).train_data()


def test_fingerprint_sees_one_bit():
    task = Digits()
    before = fingerprint(task)
    assert fingerprint(task) == before
    task.net[0].bias.data.view(torch.int32)[0] ^= 1
    assert fingerprint(task) != before


def demo(run_dir: Path, *options: str, **popen: Any) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "tasks.charlm",
        "--steps",
        "20",
        "--run-dir",
        str(run_dir),
        *options,
    ]
    return fork_server.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **popen,
    )


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_the_demo_killed_and_resumed_ends_with_the_same_weights(number, tmp_path):
    def sha(process: subprocess.Popen) -> str:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return re.search(r"sha256 ([0-9a-f]{64})", out)[1]

    whole = sha(demo(tmp_path / "whole"))
    run_dir = tmp_path / number.name
    process = demo(run_dir)
    deadline = time.monotonic() + 60
    while (
        not list(run_dir.glob("checkpoints/step-*"))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[number], out + err
    if number == signal.SIGINT:
        assert "--resume auto" in out
    assert sha(demo(run_dir, "--resume", "auto")) == whole


def test_the_demo_reports_an_error_in_one_line(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert (
            main(["--resume", str(tmp_path / "nothing"), "--run-dir", str(tmp_path / "run")]) == 1
        )
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().err.startswith("error: resume=")

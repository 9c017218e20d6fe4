"""Several ranks from a session without a script, as in a notebook: here the interpreter's input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests import fork_server

ROOT = Path(__file__).parents[2]
DEFINED = """
import time, torch
from torch import nn
from torch.utils.data import TensorDataset
from loopkit import Fit, Hook, Task
from loopkit.optim import SGD

class Points(Task):
    def __init__(self, slow=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.slow, self.net = slow, nn.Linear(4, 2)
    def train_step(self, batch):
        time.sleep(self.slow)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def eval_step(self, batch):
        return {"loss": self.train_step(batch)}
    def predict_step(self, batch):
        return self.net(batch[0]).argmax(-1)
    def optimizers(self):
        return SGD(lr=0.5)
    def train_data(self):
        return points(64, 1)
    def eval_data(self):
        return points(21, 2)

def points(count, seed):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())

class Greets(Hook):
    def on_fit_end(self, run):
        print("hello from", run.strategy.world_size)
"""


def session(text: str, place: Path, popen: Any = fork_server.Popen) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = popen(
        [sys.executable, "-u", "-"],
        cwd=place,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(DEFINED + text)
    process.stdin.close()
    process.stdin = None
    return process


def test_weights_results_and_predictions_come_back(tmp_path):
    process = session(
        """
plain = Points()
expected = Fit(batch_size=16, accumulate=2, epochs=2, progress=False).run(plain)
task = Points()
fit = Fit(strategy="fsdp", devices=2, batch_size=16, epochs=2, progress=False, hooks=[Greets()])
result = fit.run(task)
assert result.status == "finished" and result.step == expected.step == 4, result
assert torch.allclose(task.net.weight, plain.net.weight, atol=1e-6)
assert abs(result.metrics["eval/loss"] - expected.metrics["eval/loss"]) < 1e-6
assert torch.equal(fit.predict(task, points(7, 3)), Fit().predict(task, points(7, 3)))
print("same", result.checkpoint.is_dir())
""",
        tmp_path,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines() == ["hello from 2", "same True"]


def test_a_rank_that_fails_is_an_error_of_the_session_which_continues(tmp_path):
    process = session(
        """
Points.train_step = lambda self, batch: 1 / 0
before = Points()
task = Points()
try:
    Fit(strategy="ddp", devices=2, progress=False).run(task)
except Exception as error:
    print(type(error).__name__, error)
print(torch.equal(task.net.weight, before.net.weight))
""",
        tmp_path,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines() == [
        "LoopkitError the 2 ranks of this session ended with exit code 1; the error is printed above",
        "True",
    ]
    assert "failed:\nTraceback" in err
    assert "ZeroDivisionError: division by zero" in err


def test_ctrl_c_saves_and_the_session_continues(tmp_path):
    process = session(
        """
result = Fit(strategy="ddp", devices=2, epochs=1000, progress=False, run_dir="run", hooks=[Greets()]).run(Points(slow=0.02))
print(result.status, result.step > 0, result.checkpoint.is_dir())
""",
        tmp_path,
    )
    # The first step is always logged.
    while not any(path.stat().st_size for path in tmp_path.glob("run/metrics.jsonl")):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.splitlines() == ["hello from 2", "interrupted True True"], err

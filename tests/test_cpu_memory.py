"""The process keeps the memory that a step on the CPU frees. Page faults are counted, and not timed."""

import os
import subprocess
import sys

import pytest
import torch

from loopkit import cpu_memory
from loopkit.cpu_memory import freed_memory_kept, glibc

pytestmark = pytest.mark.skipif(glibc({}) is None, reason="the C library is not glibc")

# Blocks of a few MB, all alive at once, as the activations of a step.
STEP = """
import resource
import torch
from loopkit.cpu_memory import freed_memory_kept

torch.set_num_threads(1)
CPU = torch.device("cpu")

def faults(steps=20):
    found = []
    for _ in range(steps):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.zeros(2**20) for _ in range(16)]
        del blocks
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return sorted(found)[steps // 2]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
"""

TRAIN = """
import resource
import torch
from torch import nn
from torch.utils.data import TensorDataset
from loopkit import Fit, Task
from loopkit.optim import SGD

torch.set_num_threads(1)
found = []

class Wide(Task):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 1))

    def noted(self, batch):
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        return self.net(batch[0])

    def train_step(self, batch):
        return self.noted(batch).square().mean()

    def eval_step(self, batch):
        return {"loss": self.noted(batch).square().mean()}

    def optimizers(self):
        return SGD(lr=0.1)

    def train_data(self):
        return TensorDataset(torch.ones(256 * 30, 8))

task = Wide()
fit = Fit(epochs=1, batch_size=256, loggers=None, progress=False, checkpoint=False)

def by_hand():
    with fit.prepare(task) as prepared:
        for batch in prepared.batches():
            prepared.backward(prepared.forward(batch))
            prepared.step()

for way in (lambda: fit.run(task), lambda: fit.evaluate(task, task.train_data()), by_hand):
    found.clear()
    way()
    steps = sorted(b - a for a, b in zip(found, found[1:]))
    print(steps[len(steps) // 2])
"""


def printed(code: str) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_a_step_gets_its_memory_from_the_last_one_and_the_end_returns_it():
    code = STEP + "with freed_memory_kept(CPU):\n"
    code += "    with freed_memory_kept(CPU): pass\n"  # an evaluation in a hook
    code += "    print(faults()); held = resident()\n"
    code += "print(held - resident())"
    inside, returned = map(float, printed(code))
    assert inside < 20  # of 16,384 pages
    assert returned > 50  # of 64 MB


class Recorder:
    def __init__(self):
        self.calls = []

    def mallopt(self, name, value):
        self.calls.append((name, value))
        return 1

    def malloc_trim(self, pad):
        self.calls.append("trim")


def test_only_the_cpu_changes_it_and_only_the_outermost_run_returns_memory(monkeypatch):
    libc = Recorder()
    monkeypatch.setattr(cpu_memory, "glibc", lambda environment: libc)
    with freed_memory_kept(torch.device("cuda")):
        assert libc.calls == []
    with freed_memory_kept(torch.device("cpu")):
        with freed_memory_kept(torch.device("cpu")):
            pass
        assert "trim" not in libc.calls
    assert libc.calls[-1] == "trim"


@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_limits_of_the_users_own_are_left_alone(variables):
    assert glibc({"PATH": "/bin"}) is not None
    assert glibc(variables) is None


def test_training_evaluation_and_a_loop_by_hand_keep_it():
    assert all(int(faults) < 20 for faults in printed(TRAIN))  # a plain loop has 4,032

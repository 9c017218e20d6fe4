"""micro_batch="auto": a step that does not fit starts again with smaller micro-batches, and has the
same gradient.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassAccuracy

from loopkit import Checkpoint, Loader, StepLoop
from loopkit.errors import LoopkitWarning, OptionError
from tests import fork_server
from tests.support import Recorder, Tiny, digest, points, quiet

ROOT = Path(__file__).parents[2]


class Hungry(Tiny):
    """Raises what CUDA raises for more than ``most`` samples at once, after it has used some of the
    batch.
    """

    def __init__(self, most: int, weights: bool = False) -> None:
        super().__init__(dropout=0.0)
        self.most, self.weights, self.taken = most, weights, []

    def train_step(self, batch):
        x, y = batch
        self.log("seen", float(len(x)), reduce="sum")
        self.taken.append(len(x))
        loss = F.cross_entropy(self.net(x), y)
        if (
            len(x) > self.most and self.taken.count(len(x)) == 2
        ):  # with the gradients of the first one there
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return {"loss": loss, "weight": torch.tensor(len(x))} if self.weights else loss


@dataclass
class Rows:
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("kind", ["object", "several data sets"])
def test_a_batch_that_cannot_be_split_is_refused(kind):
    class Whole(Tiny):
        def train_data(self):
            if kind == "object":
                return [Rows(*points(8)[:])]
            return {"a": points(8), "b": Loader(points(4), 2)}

        def train_step(self, batch):
            raise torch.OutOfMemoryError("CUDA out of memory")

    text = r"memory ran out, and micro_batch='auto' cannot split a batch of the type (Rows|dict)"
    with pytest.raises(OptionError, match=text):
        quiet(micro_batch="auto", batch_size=8).run(Whole())


@pytest.mark.parametrize("weights", [False, True])
def test_the_run_is_that_of_a_larger_memory(weights):
    options = {
        "batch_size": 8,
        "accumulate": 2,
        "epochs": 2,
        "precision": "fp64",
        "log_every": 1,
        "clip_norm": 1.0,
    }
    whole = Hungry(1000, weights)
    rows = quiet(**options).run(whole).history
    task = Hungry(4, weights)
    with pytest.warns(
        LoopkitWarning, match=r"step 1 does not fit into memory \(CUDA out of memory.*into 2 parts"
    ):
        cut = quiet(micro_batch="auto", **options).run(task).history
    for name, weight in whole.state_dict().items():
        assert (task.state_dict()[name] - weight).abs().max() < 1e-12
    for mine, theirs in zip(cut, rows):
        assert mine.keys() == theirs.keys()
        for name in {"train/loss", "train/grad_norm", "seen"} & mine.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-12), name
    assert task.taken[:4] == [8, 8, 4, 4]
    assert max(task.taken[2:]) == 4


def test_a_failed_attempt_leaves_nothing_in_buffers_and_metrics():
    class Counting(Hungry):
        def __init__(self, most):
            super().__init__(most)
            self.accuracy = MulticlassAccuracy(3, average="micro")
            self.answers = CatMetric()
            self.register_buffer("seen_so_far", torch.zeros(()))
            self.register_buffer("last", torch.zeros(8))

        def train_step(self, batch):
            x, y = batch
            self.accuracy.update(self.net(x), y)
            self.answers.update(y)
            self.seen_so_far += len(x)
            self.last = x[-1]
            return super().train_step(batch)

    def run(most):
        task = Counting(most)
        quiet(batch_size=8, accumulate=2, epochs=1, micro_batch="auto").run(task)
        return task

    with pytest.warns(LoopkitWarning, match="into 2 parts"):
        cut = run(4)
    whole = run(1000)
    assert cut.seen_so_far == whole.seen_so_far == 60
    assert cut.last.tolist() == whole.last.tolist()
    assert cut.accuracy.tp.tolist() == whole.accuracy.tp.tolist()
    assert cut.answers.compute().tolist() == whole.answers.compute().tolist()


def test_what_fits_is_kept_by_a_resume(tmp_path):
    def run(place, stop=None):
        task, recorder = Hungry(4), Recorder()
        fit = quiet(
            batch_size=8,
            accumulate=2,
            epochs=2,
            micro_batch="auto",
            run_dir=place,
            resume="auto",
            hooks=[recorder],
            checkpoint=Checkpoint(every="never"),
        )
        if stop:
            fit.on("step_end", lambda r, out: r.stop("") if r.progress.step == stop else None)
        fit.run(task)
        return digest(task.state_dict()), recorder.losses, task.taken

    with pytest.warns(LoopkitWarning):
        whole = run(tmp_path / "whole")
    with pytest.warns(LoopkitWarning):
        first = run(tmp_path / "run", 3)
    rest = run(tmp_path / "run")
    assert (rest[0], first[1] + rest[1]) == whole[:2]
    assert max(rest[2]) == 4


def test_one_sample_that_does_not_fit_is_an_error():
    class Never(Tiny):
        def train_step(self, batch):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with warnings.catch_warnings(record=True) as told, pytest.raises(torch.OutOfMemoryError):
        warnings.simplefilter("always")
        quiet(micro_batch="auto", batch_size=4).run(Never())
    assert (
        len([w for w in told if "does not fit into memory" in str(w.message)]) == 2
    )  # from 4 to 2 to 1


def test_other_errors_and_other_steps_pass():
    class Wrong(Tiny):
        def train_step(self, batch):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        quiet(micro_batch="auto").run(Wrong())
    with pytest.raises(OptionError, match="brings its own step"):
        quiet(micro_batch="auto", step=StepLoop()).run(Tiny())
    with pytest.raises(OptionError, match=r"micro_batch='big' is not known"):
        quiet(micro_batch="big")


LIMITED = """
import resource, sys, warnings
import torch
from torch import nn
from torch.utils.data import TensorDataset
from loopkit import Task
from tests import fork_server
from tests.support import quiet

class Wide(Task):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 40_000), nn.Linear(40_000, 1)

    def train_step(self, batch):
        return self.down(self.up(batch[0]).relu()).square().mean()

    def optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def train_data(self):
        return TensorDataset(torch.randn(2048, 8, generator=torch.Generator().manual_seed(1)))

torch.set_num_threads(1)
task = Wide()
quiet(batch_size=8, steps=1).run(Wide())
if sys.argv[1] == "limited":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, -1))
options = {"micro_batch": "auto"} if sys.argv[2] == "auto" else {}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    quiet(batch_size=1024, epochs=2, **options).run(task)
print(len([w for w in told if "does not fit" in str(w.message)]), task.down.weight.double().sum().item())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_that_is_really_short_is_enough():
    def run(*words):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return fork_server.run(
            [sys.executable, "-c", LIMITED, *words],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )

    plain, short, auto = run("free", ""), run("limited", ""), run("limited", "auto")
    assert short.returncode != 0
    assert "can't allocate memory" in short.stderr
    assert auto.returncode == 0, auto.stderr
    assert plain.stdout.split()[0] == "0"
    assert int(auto.stdout.split()[0]) >= 1
    assert float(auto.stdout.split()[1]) == pytest.approx(float(plain.stdout.split()[1]), rel=1e-6)

"""What a script does after a run, on every rank: exports, loads, evaluations; text that ranks generate."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from loopkit import Checkpoint, Task
from loopkit.errors import OptionError
from loopkit.optim import SGD
from tests.contract.jobs import make
from tests.support import quiet


class Small(Task):
    """Starts good for its evaluation, and becomes worse."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))

    def train_step(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0]).pow(2).mean()

    def eval_step(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": -self.net(batch[0]).pow(2).mean()}

    def optimizers(self) -> Any:
        return SGD(lr=0.1)

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.ones(16, 4))

    eval_data = train_data


def after_a_run(strategy: Any, where: Path, load_best: bool) -> dict[str, Any]:
    """Do on each rank what a script may do after a run; return what it sees."""
    save = Checkpoint(best="eval/loss:min", load_best=load_best)
    fit = quiet(strategy=make(strategy), steps=4, batch_size=2, eval_every=1, checkpoint=save,
                run_dir=where / "run")  # fmt: skip
    task = Small()
    result = fit.run(task)
    out = result.export(where / "out")
    found = {"files": sorted(path.name for path in out.iterdir())}
    found["summary"] = result.summary().splitlines()[0]
    found["loaded"] = sorted(Small.load(where / "run").state_dict())
    found["evaluated"] = fit.evaluate(task)["eval/loss"] == fit.evaluate(task)["eval/loss"]
    try:
        result.export(out)
    except OptionError as error:
        found["refused"] = str(error)
    if dist.get_rank() == 0:
        result.export(where / "alone")
    found["again"] = sorted(path.name for path in result.export(where / "third").iterdir())
    return found


@pytest.mark.parametrize("load_best", [True, False])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_rank_may_export(pool, tmp_path, strategy, load_best):
    both = pool(2).call(after_a_run, strategy, tmp_path, load_best)
    assert both[0] == both[1]
    assert both[0]["files"] == both[0]["again"] == ["loopkit.json", "model.safetensors"]
    assert "exists already" in both[0]["refused"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out", "alone", "third"}


SCRIPT = """
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from loopkit import Fit, Task


class Small(Task):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def train_step(self, batch):
        return self.net(batch[0]).pow(2).mean()

    def optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_data(self):
        return TensorDataset(torch.ones(16, 4))


place = Path(sys.argv[1])
fit = Fit(strategy="ddp", devices=2, accelerator="cpu", steps=2, batch_size=2, run_dir=place / "run",
          progress=False, loggers=None)
result = fit.run(Small())
files = sorted(path.name for path in result.export(place / "out").iterdir())
(place / f"seen-{torch.distributed.get_rank()}").write_text(" ".join(files))
"""


def test_a_script_that_exports_on_two_ranks_ends_well(rank_programs, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = rank_programs.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    seen = [(tmp_path / f"seen-{rank}").read_text() for rank in range(2)]
    assert seen == ["loopkit.json model.safetensors"] * 2


def generate(strategy: Any, beams: int) -> dict[str, Any]:
    """Evaluate and predict with generated text of different lengths."""
    from loopkit.interop import HFTask
    from tests.interop.models import made, samples

    kind = "T5ForConditionalGeneration"
    seen: dict[str, Any] = {}

    def keep(outputs: Any) -> dict[str, float]:
        seen["preds"] = [[t for t in row.tolist() if t > 0] for row in outputs.preds]
        return {}

    rows = samples(kind, 7)
    settings = {"max_new_tokens": 6, "num_beams": beams, "min_new_tokens": 2}
    task = HFTask(made(kind), rows, rows, compute_metrics=keep, generate=settings,
                  optimizers=SGD(lr=0.01))  # fmt: skip
    fit = quiet(strategy=make(strategy), steps=1, eval_every=1, batch_size=2, eval_batch_size=2)
    loss = fit.run(task).metrics["eval/loss"]
    return {"loss": loss, **seen}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_generated_text_is_that_of_one_process(pool, strategy, beams):
    pytest.importorskip("transformers")
    one = pool(1).call(generate, strategy, beams)[0]
    both = pool(2).call(generate, strategy, beams)
    # Ranks that stop early generate with the others until the longest text is done.
    assert both[0]["preds"] == one["preds"]
    assert len(one["preds"]) == 7
    assert both[0]["loss"] == pytest.approx(one["loss"], rel=1e-3)

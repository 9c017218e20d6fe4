from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from made_runs import Digits
from rich.console import Console
from torch import nn

from loopkit.console.layer_table import count_parameters, layer_table
from loopkit.console.summary import result_summary
from loopkit.result import Result
from loopkit.run import Progress


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.embed.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden) + 0 * torch.rand(8)
        return {"logits": self.head(hidden), "hidden": hidden}


def test_parameters_are_counted_once_however_often_they_are_used():
    counts = count_parameters(Tied())
    assert (counts.total, counts.trainable, counts.size) == (
        400 + 2 * 88,
        2 * 88,
        4 * (400 + 2 * 88),
    )
    assert str(counts) == "576 parameters, 176 trainable, 2.3 kB"


def test_rows_add_up_and_the_second_use_of_a_weight_says_so():
    summary = layer_table(Tied())
    assert (
        sum(row.counts.total for row in summary.rows if row.depth == 1)
        == summary.totals.total
        == 576
    )
    assert summary.rows[0].counts == summary.totals
    head = summary.rows[-1]
    assert (head.name, head.counts.total, head.shared) == ("head", 0, 400)
    assert (
        str(summary)
        == """\
Layer     Class       Parameters  Trainable
-------------------------------------------
(model)   Tied               576        176
  embed   Embedding          400         no
  blocks  ModuleList         176        yes
    0     Sequential          88        yes
    1     Sequential          88        yes
  head    Linear          shared
-------------------------------------------
576 parameters, 176 trainable, 2.3 kB"""
    )


def test_a_batch_shows_shapes_and_leaves_no_trace():
    model = Tied()
    model.blocks[0].eval()
    modes = [part.training for part in model.modules()]
    random = torch.get_rng_state()
    summary = layer_table(model, torch.zeros(4, 6, dtype=torch.long))
    shapes = {row.name: row.shape for row in summary.rows}
    assert shapes["head"] == "[4, 6, 50]"
    assert shapes[""] == "logits [4, 6, 50], hidden [4, 6, 8]"
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(part._forward_hooks for part in model.modules())


def test_a_failing_forward_leaves_no_hooks_behind():
    model = Tied()
    with pytest.raises(IndexError):
        layer_table(model, torch.full((1,), 999))
    assert not any(part._forward_hooks for part in model.modules())
    assert model.training


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_depth_bounds_the_rows(depth):
    rows = layer_table(Tied(), depth=depth).rows
    assert max(row.depth for row in rows) == min(depth, 3)
    assert rows[0].counts.total == 576


def test_a_task_is_run_through_its_predict_step():
    class Predicts(Digits):
        def predict_step(self, batch):
            return self.net(batch[0]).argmax(-1)

    summary = layer_table(Predicts(), (torch.zeros(3, 64), torch.zeros(3)))
    assert {row.name: row.shape for row in summary.rows}[""] == "[3]"
    assert {row.name: row.shape for row in summary.rows}["net.0"] == "[3, 128]"


def test_a_dict_is_handed_over_by_name():
    class Named(nn.Module):
        def forward(self, x, y):
            return x + y

    (row,) = layer_table(Named(), {"x": torch.zeros(2), "y": torch.zeros(2)}).rows
    assert row.shape == "[2]"


def test_meta_parameters_are_summarised_without_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100_000, 100_000), nn.Linear(100_000, 10))
    summary = layer_table(model, torch.zeros(2, 100_000))
    assert summary.rows[-1].shape == "[2, 10]"
    assert summary.totals.total == 100_000 * 100_000 + 100_000 + 100_000 * 10 + 10


def test_lazy_parameters_are_said_to_be_and_stay_lazy():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    assert (
        str(count_parameters(model))
        == "10 parameters, all trainable, 40 B; 2 more without a shape yet"
    )
    assert layer_table(model).cells()[1][:3] == ["  0", "LazyLinear", "lazy"]
    known = layer_table(model, torch.zeros(3, 7))
    assert known.rows[1].shape == "[3, 4]"
    assert known.totals.total == 7 * 4 + 4 + 10
    assert count_parameters(model).lazy == 2


def test_rich_prints_it_as_a_table():
    console = Console(file=io.StringIO(), width=100)
    console.print(layer_table(Tied(), torch.zeros(1, 1, dtype=torch.long)))
    text = console.file.getvalue()
    assert "Output shape" in text
    assert text.splitlines()[-1].strip() == "576 parameters, 176 trainable, 2.3 kB"


def test_the_end_of_a_run_reads_in_aligned_blocks():
    progress = Progress(epoch=4, step=400, samples=12800, seconds=125.0)
    metrics = {
        "train/loss": 0.1895,
        "lr": 1e-3,
        "eval/loss": 0.3476,
        "eval/accuracy": 0.8737,
        "eval/runtime": 5.0,
    }
    best = {
        "metric": "eval/accuracy",
        "value": 0.9,
        "step": 300,
        "checkpoint": "runs/1/checkpoints/step-300",
    }
    timings = {"data": 62.0, "compute": 1494.0, "update": 332.0, "framework": 112.0, "step": 2000.0}
    result = Result(
        status="finished",
        reason="",
        step=400,
        epoch=4,
        metrics=metrics,
        best=best,
        history=[
            {"step": 300, "eval/loss": 0.3, "eval/runtime": 3.0},
            {"step": 350, "train/loss": 0.2},
            {"step": 400, "train/loss": 0.1895},
            {"step": 400, "eval/loss": 0.3476, "eval/runtime": 5.0},
        ],
        checkpoint=Path("runs/1/checkpoints/step-000000000400"),
        run_dir=Path("runs/1"),
        timings=timings,
        progress=progress,
        peak_memory=1_200_000_000,
        _next={"load": "Digits.load('runs/1')"},
    )
    text = result_summary(result)
    assert (
        text
        == """\
***** finished *****
  steps            = 400 (4 epochs)
  training         = 1:57 (3.4 steps/s)
  evaluation       = 8.00 s (2 evaluations)
  samples          = 12,800
  peak memory      = 1.20 GB
  run              = runs/1
  checkpoint       = runs/1/checkpoints/step-000000000400
***** eval metrics, of the last evaluation *****
  eval/accuracy    = 0.8737
  eval/loss        = 0.3476
  eval/runtime     = 5.00 s
***** train metrics, mean of steps 351 to 400 *****
  train/loss       = 0.1895
***** best *****
  eval/accuracy    = 0.9000 at step 300 of 400
  best checkpoint  = runs/1/checkpoints/step-300
***** time per step *****
  data             =    62 µs    3.1%
  forward+backward = 1,494 µs   74.7%
  update           =   332 µs   16.6%
  framework        =   112 µs    5.6%
  in all           = 2,000 µs  100.0%
***** next *****
  load             = Digits.load('runs/1')"""
    )


def test_without_a_monitor_the_lowest_loss_is_the_best_and_its_checkpoint_is_named_if_kept(
    tmp_path,
):
    history = [{"step": n, "eval/loss": loss} for n, loss in ((1, 2.0), (2, 1.0), (3, 1.5))]
    history += [{"step": 4, "eval/loss": float("nan")}]
    newest = tmp_path / "step-000000000004"
    result = Result("finished", "", 4, 1, {}, {}, history, newest, tmp_path, {})
    assert "eval/loss       = 1.0000 at step 2 of 4" in result.summary()
    assert "not kept: Checkpoint(best='eval/loss:min') keeps it" in result.summary()
    newest.with_name("step-000000000002").mkdir()
    assert f"best checkpoint = {tmp_path}/step-000000000002" in result.summary()


def test_a_run_of_which_nothing_is_known_has_a_summary():
    empty = Result("stopped", "time is up", 0, 0, {}, {}, [], None, None, {})
    text = result_summary(empty)
    assert text.splitlines()[0] == "***** stopped: time is up *****"
    assert len(text.splitlines()) == 4

"""Values that a task logs belong to the step in which a loop called it, and to nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loopkit import Hook, SingleDevice, Task
from loopkit.strategies.base import ComputeSettings
from tests.support import Tiny, quiet


class Logs(Tiny):
    """Logs the mean of its inputs in each training step."""

    def train_step(self, batch: Any) -> Any:
        self.log("mean", batch[0].mean())
        return super().train_step(batch)


def test_a_loop_by_hand_keeps_no_logged_value():
    class Wide(Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)

        def train_step(self, x: Any) -> Any:
            loss = self.net(x).square().mean()
            self.log("loss", loss)
            return loss

    task, strategy = Wide(), SingleDevice("cpu")
    strategy.setup_environment(ComputeSettings())
    strategy.setup_module(task)
    strategy.setup_optimizers({"main": torch.optim.SGD(task.parameters(), lr=0.0)})
    step = strategy.step_fn("train_step")
    alive = []
    for _ in range(3):
        strategy.backward(step(torch.ones(4, 8)))
        strategy.finalize_gradients()
        strategy.optimizer_step()
        strategy.finish_step()
        alive.append(len(task.log_collector._outer))
    assert alive == [0, 0, 0]
    with task.log_collector as logged:
        step(torch.ones(4, 8))
    assert [name for name, _, _ in logged] == ["loss"]
    assert logged[0][1].grad_fn is None, "a logged value keeps no graph"


def test_a_hook_that_calls_the_step_changes_nothing_that_is_logged():
    class Probe(Hook):
        def on_step_end(self, run: Any, out: Any) -> None:
            with torch.no_grad():
                run.task.train_step((torch.full((4, 8), 100.0), torch.zeros(4, dtype=torch.long)))

        def on_micro_step_end(self, run: Any, out: Any) -> None:
            self.on_step_end(run, out)

    rows = []
    for hooks in ([], [Probe()]):
        result = quiet(steps=4, log_every=2, eval_every="never", hooks=hooks).run(Logs())
        rows.append([row["mean"] for row in result.history if "mean" in row])
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3


def test_a_failed_step_leaves_no_collector_open():
    class Fails(Tiny):
        def train_step(self, batch: Any) -> Any:
            self.log("before", 1.0)
            raise ZeroDivisionError

    task = Fails()
    try:
        quiet().run(task)
    except ZeroDivisionError:
        assert task.log_collector.values is None


def test_what_a_task_logs_in_its_events_is_logged():
    class Listens(Tiny):
        def on_step_end(self, run: Any, out: Any) -> None:
            self.log("seen", float(run.progress.step))

        def on_epoch_end(self, run: Any) -> None:
            self.log("epochs", run.progress.epoch, reduce="last")

    result = quiet(epochs=2, log_every=1, eval_every="never").run(Listens())
    seen = [row["seen"] for row in result.history if "seen" in row]
    assert seen == [float(n + 1) for n in range(result.step)]
    assert any(row.get("epochs") == 1 for row in result.history)

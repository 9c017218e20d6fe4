"""Events in their order, hooks with state, requests and subscriptions."""

from __future__ import annotations

from typing import Any

import pytest

from loopkit import Checkpoint, Hook, StepLoop
from loopkit.errors import CheckpointError, LoopkitWarning
from loopkit.events import EVENTS
from loopkit.optim import AdamW
from tests.support import Tiny, points, quiet

TRACE = """setup
fit_start
epoch_start
step_start
micro_step_end
micro_step_end
before_update
step_end
log
commit
step_start
micro_step_end
before_update
step_end
epoch_end
eval_start
eval_step_end
log
eval_end
commit
epoch_start
step_start
micro_step_end
micro_step_end
before_update
step_end
commit
step_start
micro_step_end
before_update
step_end
log
epoch_end
eval_start
eval_step_end
log
eval_end
commit
save
fit_end"""


class Trace(Hook):
    """Notes every event."""

    def __init__(self) -> None:
        self.seen: list[str] = []


for _event in EVENTS:
    setattr(Trace, f"on_{_event}", lambda self, *args, _event=_event: self.seen.append(_event))


def test_the_golden_trace(tmp_path):
    hook = Trace()
    quiet(
        hooks=[hook],
        epochs=2,
        batch_size=8,
        eval_batch_size=20,
        accumulate=2,
        run_dir=tmp_path,
        resume="auto",
        checkpoint=Checkpoint(every="2 epochs", background=False),
    ).run(Tiny(count=20))
    assert "\n".join(hook.seen) == TRACE


def test_a_resumed_run_loads_before_it_starts(tmp_path):
    quiet(run_dir=tmp_path, checkpoint=True).run(Tiny())
    hook = Trace()
    with pytest.warns(LoopkitWarning, match="a run of 2 steps and now for one of 4"):
        quiet(run_dir=tmp_path, checkpoint=True, epochs=2, resume="auto", hooks=[hook]).run(Tiny())
    assert hook.seen[:4] == ["setup", "load", "fit_start", "epoch_start"]


def test_an_error_reaches_the_hooks_and_the_caller():
    hook = Trace()

    class Fails(Tiny):
        def train_step(self, batch):
            raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        quiet(hooks=[hook]).run(Fails())
    assert hook.seen[-1] == "error"


def test_the_task_is_the_first_listener():
    order: list[str] = []

    class Listens(Tiny):
        def on_step_end(self, run, out):
            order.append("task")

    class After(Hook):
        def on_step_end(self, run, out):
            order.append("hook")

    quiet(hooks=[After()], steps=1).run(Listens())
    assert order == ["task", "hook"]


def test_gradients_are_alive_before_the_update_and_progress_counts_completed_things_only():
    norms, steps = [], []
    fit = quiet(epochs=1, batch_size=20, clip_norm=1e-3, eval_every="never")

    @fit.on("before_update")
    def look(run: Any, norm: Any) -> None:
        clipped = sum(float(p.grad.square().sum()) for p in run.task.parameters()) ** 0.5
        norms.append((float(norm), clipped))
        steps.append(run.progress.step)

    fit.on("step_end", lambda run, out: steps.append(run.progress.step))
    fit.run(Tiny())
    assert steps == [0, 1, 1, 2, 2, 3]
    assert all(norm > 0.01 and abs(clipped - 1e-3) < 1e-5 for norm, clipped in norms)


def test_subscriptions_have_a_cadence():
    seen: dict[str, list[int]] = {"3 steps": [], "1 epoch": [], "50%": []}
    fit = quiet(epochs=2, batch_size=10, eval_every="never")
    for every, steps in seen.items():
        fit.on(
            "step_end", lambda run, out, steps=steps: steps.append(run.progress.step), every=every
        )
    fit.run(Tiny())
    assert seen == {"3 steps": [3, 6, 9, 12], "1 epoch": [6, 12], "50%": [6, 12]}


def test_requests_are_met_at_the_end_of_the_same_step(tmp_path):
    steps: dict[str, list[int]] = {"eval_end": [], "save": [], "log": []}
    fit = quiet(
        epochs=1,
        batch_size=10,
        eval_every="100 steps",
        log_every="100 steps",
        run_dir=tmp_path,
        checkpoint=Checkpoint(every="100 steps", background=False),
        loggers=None,
    )
    for event, seen in steps.items():
        fit.on(event, lambda run, *_, seen=seen: seen.append(run.progress.step))
    asked = {2: "eval", 3: "save", 4: "log"}
    fit.on(
        "step_end",
        lambda run, out: (
            run.request(asked[run.progress.step]) if run.progress.step in asked else None
        ),
    )
    fit.run(Tiny())
    assert steps == {"eval_end": [2, 6], "save": [3, 6], "log": [1, 2, 4, 6, 6]}


def test_end_epoch_closes_the_pass_early():
    epochs = []
    fit = quiet(steps=6, epochs=10, batch_size=10, eval_every="never")
    fit.on(
        "step_end",
        lambda run, out: run.request("end_epoch") if run.progress.step_in_epoch == 2 else None,
    )
    fit.on("epoch_end", lambda run: epochs.append((run.progress.epoch, run.progress.step)))
    fit.run(Tiny())
    assert epochs == [(1, 2), (2, 4), (3, 6)]


def test_stop_ends_the_run_with_its_reason():
    fit = quiet(epochs=5, batch_size=10)
    fit.on("step_end", lambda run, out: run.stop("enough") if run.progress.step == 7 else None)
    result = fit.run(Tiny())
    assert (result.status, result.reason, result.step) == ("stopped", "enough", 7)


class Counts(Hook):
    """Counts steps, and survives."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, run, out):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_hook_state_is_saved_under_class_name_and_occurrence(tmp_path):
    quiet(run_dir=tmp_path, checkpoint=True, hooks=[Counts(), Counts()]).run(Tiny())
    hooks = [Counts(), Counts()]
    hooks[1].count = 100
    with pytest.warns(LoopkitWarning, match="the schedule"):
        quiet(run_dir=tmp_path, checkpoint=True, hooks=hooks, epochs=2, resume="auto").run(Tiny())
    assert [hook.count for hook in hooks] == [4, 4]


def test_what_cannot_be_saved_is_named(tmp_path):
    class Bad(Counts):
        def state_dict(self):
            return {"cache": [1, object()]}

    steps: list[int] = []
    fit = quiet(run_dir=tmp_path, checkpoint=True, hooks=[Bad()])
    fit.on("step_end", lambda run, out: steps.append(run.progress.step))
    with pytest.raises(CheckpointError, match=r"Bad\.state_dict\(\)\.cache.*object"):
        fit.run(Tiny())
    assert steps == [], "it is refused before the first step"


def test_values_logged_by_task_and_hooks_are_averaged_between_logs():
    class Logs(Tiny):
        def train_step(self, batch):
            self.log("seen", float(len(batch[0])))
            self.log("most", float(len(batch[0])), reduce="max")
            self.log("sum", 1.0, reduce="sum")
            return {"loss": super().train_step(batch), "extra": 2.0}

    fit = quiet(batch_size=8, log_every="100 steps", eval_every="never")
    fit.on("step_end", lambda run, out: run.log({"hook": run.progress.step}))
    result = fit.run(Logs(count=20))
    row = result.history[-1]
    assert row["most"] == 8
    assert row["sum"] == 2  # of the two steps after the first log
    assert row["hook"] == 2.5
    assert row["seen"] == pytest.approx((8 * 8 + 4 * 4) / 12)
    assert row["train/extra"] == 2.0


def test_a_custom_step_in_the_task_needs_no_option():
    calls = []

    class Twice(StepLoop):
        def run(self, run, batches):
            calls.append(len(batches))
            return super().run(run, batches)

    class Own(Tiny):
        def loops(self):
            return {"step": Twice()}

    assert quiet(batch_size=20).run(Own()).step == 3
    assert calls == [1, 1, 1]
    calls.clear()
    quiet(batch_size=20, step=StepLoop()).run(Own())
    assert not calls


def test_limits_of_development():
    result = quiet(limit_train=2, limit_eval=1, epochs=3, batch_size=4).run(Tiny())
    assert (result.step, result.epoch) == (6, 3)
    losses = []
    fit = quiet(overfit=1, epochs=200, batch_size=8, eval_every="100 epochs")
    fit.on("eval_end", lambda run, metrics: losses.append(metrics["eval/loss"]))
    fit.run(Tiny(dropout=0.0))
    assert losses[-1] < 0.1


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 1.5}, 9),
        ({"steps": 7}, 7),
        ({"steps": 100}, 100),
        ({"epochs": 2, "steps": 100}, 12),
        ({"epochs": 2, "steps": 5}, 5),
        ({}, 6),
        ({"global_batch_size": 30}, 2),
        ({"time": 1e-9}, 1),
    ],
)
def test_the_first_limit_reached_ends_the_run(options, steps):
    task = Tiny()
    task.optimizers = lambda: AdamW(lr=1e-3)
    assert quiet(**{"batch_size": 10, **options}).run(task).step == steps


def test_batches_carry_what_is_known_of_them():
    seen = []
    fit = quiet(batch_size=8, accumulate=3, eval_every="never")
    fit.on("step_start", lambda run, b: seen.append((len(b), b.sizes, b.start, b.end, b.last)))
    fit.run(Tiny(count=30))
    assert seen == [(3, [8, 8, 8], 0, 24, False), (1, [6], 24, 30, True)]
    assert len(points(3)) == 3

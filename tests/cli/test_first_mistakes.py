"""What people type first who come from another library, and what answers them.

A row is a mistake and the words that must be in the answer. Other tests have many more mistakes of
each kind: tests/test_foreign_values.py, tests/test_keywords.py, tests/cli/test_usage.py.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics

from loopkit import Checkpoint, Task
from loopkit.optim import SGD, AdamW
from tests.support import Tiny, quiet

PLAIN = """
from loopkit import Task
from tests.support import Tiny


class Plain(Tiny):
    def __init__(self, width: int = 8):
        super().__init__()
"""


@pytest.fixture
def plain(tmp_path):
    """A task without a learning rate, in a file; and two runs of it that never were."""
    (tmp_path / "plain.py").write_text(PLAIN)
    for number in "12":
        (tmp_path / f"runs/slow/{number}/checkpoints").mkdir(parents=True)
    yield "plain.py"
    sys.modules.pop("plain", None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--accelerator", "gpu"], "accelerator='gpu': here that is \"cuda\""),
        (["--precision", "bf16-mixed"], "precision='bf16-mixed': here that is \"bf16\""),
        (["--precision", "16-mixed"], "precision='16-mixed': here that is \"fp16\""),
        (["--precision", "32-true"], "precision='32-true': here that is \"fp32\""),
        (["--lr", "3e-4"], "there is no option --lr. Here that is Task.optimizers: AdamW(lr=...)"),
        (["--hooks", "EarlyStop"], "give --hooks '[EarlyStop]', or --hooks+='EarlyStop'"),
        (
            ["--hooks", "EarlyStopping"],
            "'EarlyStopping': here that is EarlyStop, in a list: give --hooks '[EarlyStop]', or",
        ),
        (["--hooks+=EarlyStopping"], "here that is loopkit.hooks.EarlyStop"),
        (["--hooks", "ModelCheckpoint"], "here that is Fit(checkpoint=Checkpoint(best="),
        (["--epochs", "three"], "epochs: 'three' is not accepted: give a number or null."),
        (["--steps", "many"], "steps: 'many' is not accepted: give a whole number or null."),
        (["--eval-first", "maybe"], "eval_first: 'maybe' is not accepted: give true or false."),
        (["--width", "wide"], "task.width: 'wide' is not accepted: give a whole number."),
    ],
)
def test_a_value_or_an_option_of_the_command_line(loopkit, plain, words, says):
    assert says in loopkit.refused("fit", plain, *words)


def test_a_folder_of_runs_is_no_checkpoint(loopkit, plain):
    code, out, err = loopkit("evaluate", plain, "--checkpoint", "runs/slow")
    assert (code != 0, out) == (True, "")
    assert "runs/slow is no run, and holds 2: name one of runs/slow/1, runs/slow/2" in err


def test_weights_that_were_never_trained_are_named_before_they_are_measured(
    loopkit, plain, monkeypatch
):
    def measured(fit: Any, task: Any, checkpoint: Any) -> dict[str, float]:
        print("measured")
        return {}

    monkeypatch.setattr("loopkit.fit.fit.Fit.evaluate", measured)
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # in the order of a terminal
    out = loopkit.ok("evaluate", plain)
    assert out.startswith("loopkit: no --checkpoint: Plain keeps the weights it is built with\n")


class Unbuilt(Task):
    def __init__(self) -> None:
        self.net = torch.nn.Linear(1, 1)


class Frozen(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


def with_method(name: str, method: Callable[..., Any]) -> Tiny:
    return type("Ported", (Tiny,), {name: method})()


def training_step() -> Tiny:
    """A task of Lightning's methods alone."""
    own = {"train_step": Task.train_step, "training_step": lambda self, batch, batch_idx: None}
    return type("Ported", (Tiny,), own)()


def lists_of_lightning(self: Any) -> Any:
    optimizers = [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]
    return optimizers, []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (training_step, "Ported.training_step is never called: here that is train_step(self, bat"),
        (
            lambda: with_method("train_step", lambda self, batch, batch_idx: None),
            "is called with the batch alone: define train_step(self, batch); the number of the",
        ),
        (
            lambda: with_method("metrics", lambda self: [torchmetrics.MeanMetric()]),
            "metrics() returned list: return a dict of names to metrics",
        ),
        (
            lambda: with_method("optimizers", lists_of_lightning),
            "returned 2 optimizers without names: return a dict",
        ),
        (
            lambda: with_method("optimizers", lambda self: AdamW(lr=0.1, schedule="cosine")),
            "AdamW(schedule='cosine'): give a schedule of loopkit.optim, as schedule=cosine()",
        ),
        (Frozen, "AdamW has nothing to train in Frozen: each of its 4 parameters is frozen."),
        (
            lambda: with_method("optimizers", lambda self: SGD(lr=0.1, params=torch.nn.ReLU())),
            "SGD(params='ReLU') picks no trainable parameter of Ported",
        ),
        (
            lambda: with_method("train_step", lambda self, batch: 0.7),
            "a number without a gradient (leave out .item())",
        ),
        (Unbuilt, "cannot assign module before Module.__init__() call"),
    ],
)
def test_a_task(make, says):
    with pytest.raises(Exception, match=re.escape(says)):
        quiet(steps=1).run(make())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes since Python 3.11")
@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("self.log('a', 1, prog_bar=True)", "self.log takes name, value and reduce"),
        ("self.trainer", "a task has no trainer: here that is the run"),
        ("self.device", "a task has no device: here that is run.strategy.device in an event"),
    ],
)
def test_what_a_step_asks_of_its_task(line, note):
    namespace: dict[str, Any] = {}
    exec(f"def train_step(self, batch): {line}", namespace)
    with pytest.raises((AttributeError, TypeError)) as caught:
        quiet().run(with_method("train_step", namespace["train_step"]))
    assert note in "".join(traceback.format_exception_only(caught.value))


def test_a_list_of_one_optimizer_and_one_scheduler_is_taken():
    def both(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    assert quiet(steps=1, eval_every="never").run(with_method("optimizers", both)).step == 1


def test_what_an_evaluation_logs_has_the_name_of_its_set_before_it():
    def eval_step(self: Any, batch: Any) -> Any:
        self.log("val_acc", 0.5)
        return Tiny.eval_step(self, batch)

    assert quiet().evaluate(with_method("eval_step", eval_step))["eval/val_acc"] == 0.5


def test_a_metric_that_is_not_there_is_found_by_a_dry_run():
    def metrics(self: Any) -> Any:
        return {"accuracy": torchmetrics.classification.MulticlassAccuracy(num_classes=3)}

    fit = quiet(checkpoint=Checkpoint(best="eval/acuracy:max"), dry_run=True)
    with pytest.raises(Exception, match="Did you mean 'eval/accuracy'"):
        fit.run(with_method("metrics", metrics))

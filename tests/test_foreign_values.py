"""Values, methods, classes and call shapes of Lightning and the Trainer are answered with loopkit's."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import traceback
from typing import Any

import pytest

import loopkit
from loopkit import Checkpoint, Fit, Hook
from loopkit.errors import OptionError, TaskError
from loopkit.foreign_values import ATTRIBUTES, EVENTS, FIT_METHODS, METHODS, OBJECTS, VALUES
from loopkit.options import Options
from tests.support import Tiny, quiet


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"accelerator": "gpu"}, '"cuda"'),
        ({"accelerator": "tpu"}, "CPUs, CUDA GPUs and Apple GPUs only"),
        ({"accelerator": None}, '"auto"'),
        ({"precision": "bf16-mixed"}, '"bf16"'),
        ({"precision": "16-mixed"}, '"fp16"'),
        ({"precision": "32-true"}, '"fp32"'),
        ({"precision": 32}, '"fp32"'),
        ({"precision": 16}, '"fp16"'),
        ({"precision": "no"}, '"fp32"'),
        ({"devices": -1}, '"auto"'),
        ({"devices": [0, 1]}, "2, with CUDA_VISIBLE_DEVICES=0,1"),
        ({"devices": "2"}, "2, a number"),
        ({"strategy": "ddp_find_unused_parameters_true"}, "DDP(find_unused_parameters=True)"),
        ({"strategy": "deepspeed_stage_2"}, "DeepSpeed(stage=2)"),
        ({"strategy": None}, '"auto"'),
        ({"clip_norm": 0}, "None"),
        ({"limit_eval": 0}, 'eval_every="never"'),
        ({"limit_train": 0.0}, ""),
        ({"eval_every": 0.25}, '"0.25 epochs"'),
        ({"eval_every": "steps"}, '"500 steps"'),
        ({"eval_every": "no"}, '"never"'),
        ({"log_every": 0}, '"never"'),
        ({"epochs": -1}, "steps=<number>"),
        ({"steps": -1}, "None"),
        ({"resume": True}, '"auto"'),
        ({"resume": "last"}, '"auto"'),
        ({"hooks": None}, "()"),
        ({"checkpoint": None}, "False"),
        ({"compile": "max-autotune"}, 'Compile(mode="max-autotune")'),
        ({"activation_checkpointing": True}, '"full"'),
    ],
)
def test_a_value_of_an_option_is_answered_when_it_is_given(options, ours):
    with pytest.raises(OptionError) as caught:
        Fit(**options)
    ((name, value),) = options.items()
    assert str(caught.value).startswith(f"{name}={value!r}")
    assert ours in str(caught.value)


def test_every_table_names_what_loopkit_has():
    assert set(VALUES) <= set(vars(Options)["__dataclass_fields__"])
    assert {f"on_{name}" for name in loopkit.events.EVENTS}.isdisjoint(EVENTS)
    for ours, signature in METHODS.values():
        assert hasattr(loopkit.Task, ours)
        assert signature.startswith(ours)
    task = Tiny()
    assert [name for name in ATTRIBUTES if hasattr(task, name)] == []
    assert [name for name in FIT_METHODS if hasattr(Fit, name)] == []
    for meant in OBJECTS.values():
        if meant.startswith("loopkit."):
            path = meant.partition("(")[0].split(".")
            home = importlib.import_module(".".join(path[:-1]))
            assert hasattr(home, path[-1]), meant


class Foreign(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return batch


@pytest.mark.parametrize(
    ("name", "lacks", "ours"),
    [
        ("training_step", "train_step", "train_step(self, batch)"),
        ("compute_loss", "train_step", "train_step(self, batch)"),
        ("validation_step", "eval_step", "eval_step(self, batch)"),
        ("configure_optimizers", "optimizers", "optimizers(self)"),
        ("train_dataloader", "train_data", "train_data(self)"),
        ("val_dataloader", "eval_data", "eval_data(self)"),
    ],
)
def test_a_method_of_another_library_is_named_before_the_run(name, lacks, ours):
    own = {lacks: getattr(loopkit.Task, lacks), name: lambda self, *arguments: None}
    with pytest.raises(TaskError) as caught:
        quiet().run(type("Ported", (Tiny,), own)())
    assert str(caught.value).startswith(f"Ported.{name} is never called: here that is {ours}")


def test_a_method_beside_loopkits_is_the_users_own():
    assert quiet(steps=1, eval_every="never").run(Foreign()).step == 1


@pytest.mark.parametrize(
    ("step", "argument"), [("train_step", "batch_idx"), ("eval_step", "dataloader_idx")]
)
def test_a_step_that_needs_more_than_the_batch_is_refused(step, argument):
    namespace: dict[str, Any] = {}
    exec(f"def {step}(self, batch, {argument}): raise ZeroDivisionError", namespace)
    task = type("Ported", (Tiny,), {step: namespace[step]})()
    with pytest.raises(
        TaskError, match=rf"Ported.{step}\(self, batch, {argument}\) is called with the batch alone"
    ):
        quiet().run(task)
    optional = type(
        "Ported", (Tiny,), {"train_step": lambda self, batch, more=0: Tiny.train_step(self, batch)}
    )
    assert quiet(steps=1, eval_every="never").run(optional()).step == 1


def test_a_constructor_that_sets_hparams_is_refused():
    class Ported(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.hparams = 3  # type: ignore[assignment]

    with pytest.raises(TaskError, match=r"Ported sets self\.hparams"):
        quiet().run(Ported())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes since Python 3.11")
@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("self.device", "a task has no device: here that is run.strategy.device"),
        ("self.trainer.max_epochs", "a task has no trainer: here that is the run"),
        ("self.log('a', 1.0, prog_bar=True)", "self.log takes name, value and reduce"),
        ("self.log_dict({'a': 1.0})", "a task has no log_dict"),
        ("self.current_epoch + 1", "run.progress.epoch in an event"),
        ("return {'loss': 1.0} + 0.1", 'return {**out, "loss": out["loss"] + ...}'),
    ],
)
def test_an_error_by_anothers_attribute_has_a_note(line, note):
    namespace: dict[str, Any] = {}
    exec(f"def train_step(self, batch): {line}", namespace)
    with pytest.raises((AttributeError, TypeError)) as caught:
        quiet().run(type("Ported", (Tiny,), {"train_step": namespace["train_step"]})())
    assert note in "".join(traceback.format_exception_only(caught.value))


def test_an_error_of_the_users_own_has_no_note():
    class Ported(Tiny):
        def train_step(self, batch: Any) -> Any:
            return {}.device  # type: ignore[attr-defined]

    with pytest.raises(AttributeError) as caught:
        quiet().run(Ported())
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("on_train_batch_end", "on_step_end"),
        ("on_validation_epoch_end", "on_eval_end"),
        ("on_train_begin", "on_fit_start"),
        ("on_substep_end", "on_micro_step_end"),
    ],
)
def test_an_event_of_another_library_is_answered(name, ours):
    method = {name: lambda self, *arguments: None}
    with pytest.raises(OptionError, match=rf"{name} is no event: here that is {ours}\."):
        quiet(hooks=[type("Ported", (Hook,), method)()]).run(Tiny())
    with pytest.raises(OptionError, match=rf"{name} is no event: here that is {ours}\."):
        quiet().run(type("Ported", (Tiny,), method)())
    with pytest.raises(OptionError, match=f"here that is {ours}"):
        quiet().on(name.removeprefix("on_"), print)


@pytest.mark.parametrize(
    ("module", "name", "ours"),
    [
        ("loopkit", "Trainer", "loopkit.Fit"),
        ("loopkit", "LightningModule", "loopkit.Task"),
        ("loopkit", "ModelCheckpoint", "Fit(checkpoint=Checkpoint(best="),
        ("loopkit.hooks", "EarlyStopping", "loopkit.hooks.EarlyStop"),
        ("loopkit.hooks", "LearningRateMonitor", "loopkit.hooks.LRMonitor"),
        ("loopkit.optim", "CosineAnnealingLR", "loopkit.optim.cosine()"),
    ],
)
def test_a_class_of_another_library_is_answered_where_it_is_imported(module, name, ours):
    with pytest.raises(ImportError) as caught:
        exec(f"from {module} import {name}")
    assert f"here that is {ours}" in str(caught.value)
    assert not hasattr(importlib.import_module(module), "nothing")


def test_the_shapes_of_other_libraries_calls_are_answered():
    with pytest.raises(
        OptionError, match=r"got a Tiny: a task is trained by Fit\(\.\.\.\)\.run\(task\)"
    ):
        Fit(Tiny())
    with pytest.raises(
        AttributeError, match=r"Fit has no 'fit': here that is Fit\(\.\.\.\)\.run\(task\)"
    ):
        Fit().fit()
    with pytest.raises(OptionError, match="takes the task alone, and got a list too"):
        quiet().run(Tiny(), [1])
    with pytest.raises(TaskError, match=r"a number without a gradient \(leave out \.item\(\)\)"):
        quiet().run(type("Item", (Tiny,), {"train_step": lambda self, batch: 0.5})())


def test_a_fit_is_copied_and_pickled():
    fit = Fit(epochs=3, checkpoint=Checkpoint(keep=None))
    assert copy.deepcopy(fit).options == pickle.loads(pickle.dumps(fit)).options == fit.options

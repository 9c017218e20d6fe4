"""Checks of a task before its run, and notes to errors that another library's habit explains."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Mapping

from loopkit.errors import TaskError
from loopkit.foreign_values import ATTRIBUTES, METHODS, answer
from loopkit.loops.check_finite import place_of
from loopkit.run import Run
from loopkit.task import Task, name_of, overrides

_STEPS = ("train_step", "eval_step", "test_step", "predict_step")
_REST = {
    "batch_idx": "the number of the batch is run.progress.step in an event",
    "dataloader_idx": "self.eval_set is the name of the set",
    "optimizer_idx": "several optimizers have a StepLoop of their own",
}


def check_task(task: Task) -> None:
    """Refuse a task that is written for another library.

    Raises:
        TaskError: with loopkit's name of the method, or the arguments that it takes.
    """
    for theirs, (ours, signature) in METHODS.items():
        if callable(getattr(type(task), theirs, None)) and not overrides(task, ours):
            raise TaskError(f"{name_of(task)}.{theirs} is never called: here that is {signature}")
    for step in _STEPS:
        if overrides(task, step):
            _check_arguments(task, step)
    if not isinstance(task.hparams, Mapping):
        raise TaskError(
            f"{name_of(task)} sets self.hparams, where its constructor's arguments are recorded: "
            "leave that line out, or give the attribute another name"
        )


def _check_arguments(task: Task, step: str) -> None:
    # Of the class: a strategy may have put a wrapper around the task's own method.
    function = inspect.getattr_static(type(task), step)
    if not inspect.isfunction(function):
        return  # a compiled or a static function does not tell
    parameters = list(inspect.signature(function).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    if len(needed) > 1 or not parameters:
        reasons = [f"; {_REST[name]}" for name in needed if name in _REST]
        raise TaskError(
            f"{name_of(task)}.{step}({', '.join(['self', *needed])}) is called with the batch "
            f"alone: define {step}(self, batch){''.join(reasons)}"
        )


def explain(error: BaseException, run: Run) -> None:
    """Add a note to an error that comes from another library's attribute or argument.

    The error of an index out of range gets a note with the samples of its step. Python
    before 3.11 has no notes: the error stays as it is.
    """
    if sys.version_info < (3, 11):
        return
    task = run.task
    owner, name = getattr(error, "obj", None), getattr(error, "name", None)
    if isinstance(error, AttributeError) and owner is task and name in ATTRIBUTES:
        error.add_note(f"loopkit: a task has no {name}{answer(ATTRIBUTES, name)}")
    elif isinstance(error, TypeError) and "Task.log() got an unexpected keyword" in str(error):
        error.add_note(
            "loopkit: self.log takes name, value and reduce. Values are averaged over steps, "
            "micro-batches and ranks by themselves"
        )
    elif isinstance(error, IndexError) and re.search(r"out of (bounds|range)", str(error)):
        names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if run.loader is not None and "train_step" in names and "eval_step" not in names:
            step, samples = place_of(run, 0)
            error.add_note(
                f"loopkit: {step}. {samples}. One of them may have a label, or the number of a word, "
                "that is not below the number that the model has"
            )
    elif isinstance(error, TypeError) and re.search(r"unsupported operand.*'dict'", str(error)):
        error.add_note(
            "loopkit: a train_step that weights its loss, as that of HFTask, returns a dict. Change "
            'the loss in it: out = super().train_step(batch); return {**out, "loss": out["loss"] + ...}'
        )
    elif isinstance(error, (TypeError, AttributeError)) and _in_default_predict_step(error, task):
        error.add_note(
            f"loopkit: {name_of(task)} has no predict_step, so that forward gets the batch as it "
            "is. Define one, such as: def predict_step(self, batch): return self(batch[0])"
        )


def _in_default_predict_step(error: BaseException, task: Task) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    inside = any(f.name == "predict_step" and f.filename == inspect.getfile(Task) for f in frames)
    return inside and not overrides(task, "predict_step")

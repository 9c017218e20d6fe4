"""A hook's methods take what their event passes, or the run says so before its first step."""

from __future__ import annotations

import pytest

from loopkit import Fit, Hook
from loopkit.errors import OptionError
from loopkit.hooks import EarlyStop
from loopkit.optim import SGD, AdamW
from tests.support import Tiny, quiet


class Trainers(Hook):
    def on_step_end(self, args, state, control, **kwargs):
        raise AssertionError("never called")


class NoOutput(Hook):
    def on_step_end(self, run):
        raise AssertionError("never called")


class Free(Hook):
    def on_step_end(self, *args):
        pass

    def on_eval_end(self, run, metrics, extra=None):
        pass


class OwnEvent(Tiny):
    def on_save(self, checkpoint, path, more):
        raise AssertionError("never called")


@pytest.mark.parametrize("hook", [Trainers, NoOutput])
def test_a_method_that_cannot_be_called_is_an_error_before_the_first_step(hook):
    with pytest.raises(OptionError, match=rf"{hook.__name__}\.on_step_end takes .* \(run, out"):
        quiet(steps=1, hooks=[hook()]).run(Tiny())


def test_the_events_of_a_task_and_functions_are_checked_too():
    with pytest.raises(OptionError, match=r"OwnEvent.on_save takes .* passes \(run, path\)"):
        quiet(steps=1).run(OwnEvent())
    fit = quiet(steps=1)
    fit.on("log", lambda values: None)
    with pytest.raises(OptionError, match=r"fit.on\('log'\) takes \(values\)"):
        fit.run(Tiny())


def test_a_method_may_take_more_and_any_arguments():
    assert quiet(steps=1, eval_every=1, hooks=[Free()]).run(Tiny()).step == 1


def test_a_hook_that_is_not_in_a_list_is_an_error():
    with pytest.raises(OptionError, match=r"give a list, as hooks=\[\.\.\.\]"):
        Fit(hooks=EarlyStop())


@pytest.mark.parametrize(
    "make",
    [
        lambda task: AdamW(task.parameters(), lr=1e-3),
        lambda task: SGD(task.parameters(), 0.1),
        lambda task: SGD(list(task.parameters())),
        lambda task: AdamW(task),
    ],
)
def test_parameters_in_place_of_a_rate_are_explained(make):
    with pytest.raises(OptionError, match="first argument, which is lr"):
        make(Tiny())

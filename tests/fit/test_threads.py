"""Fits at once in one process are refused; one after another, or one within another, they work."""

from __future__ import annotations

import threading

import pytest
import torch

from loopkit.errors import OptionError
from tests.support import Tiny, digest, quiet


def in_thread(function):
    """Return what ``function`` returned, or the error that it raised, in a thread of its own."""
    found = []

    def call():
        try:
            found.append(function())
        except OptionError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0]


def weights(**options) -> str:
    task = Tiny()
    quiet(steps=6, **options).run(task)
    return digest(task.state_dict())


@pytest.mark.parametrize(
    "second",
    [
        lambda: quiet(steps=2).run(Tiny()),
        lambda: quiet(dry_run=True).run(Tiny()),
        lambda: quiet().evaluate(Tiny()),
        lambda: quiet().predict(Tiny(), data=[torch.randn(2, 8)]),
    ],
    ids=["run", "dry run", "evaluate", "predict"],
)
def test_a_second_thread_is_refused_and_the_first_has_its_own_numbers(second):
    alone, answers = weights(), []
    task, fit = Tiny(), quiet(steps=6)
    fit.on("step_end", lambda run, out: answers.append(in_thread(second)))
    fit.run(task)
    assert len(answers) == 6
    assert all("another thread of this process runs a Fit" in str(each) for each in answers)
    assert digest(task.state_dict()) == alone


def test_a_fit_within_a_hook_of_a_fit_works():
    inner = []
    task, fit = Tiny(), quiet(steps=6)
    fit.on("epoch_end", lambda run: inner.append(weights()))
    fit.on("fit_end", lambda run: inner.append(quiet().evaluate(Tiny())["eval/loss"]))
    fit.run(task)
    assert len(inner) >= 2


def test_threads_one_after_another_work_also_after_an_error():
    with pytest.raises(ZeroDivisionError):
        fit = quiet(steps=2)
        fit.on("step_end", lambda run, out: 1 / 0)
        fit.run(Tiny())
    assert in_thread(weights) == in_thread(weights) == weights()

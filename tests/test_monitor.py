"""Monitor and the checks of values: what is read, what is better, what is refused with which words."""

from __future__ import annotations

import math
import re

import pytest

from loopkit.checks import checked_choice, checked_int, checked_number
from loopkit.errors import MetricError, OptionError
from loopkit.monitor import Monitor

NAN = math.nan


def test_a_monitor_is_read_from_its_text_and_written_back():
    monitor = Monitor.parse("eval/words: few/loss:min", "best")
    assert monitor == Monitor("eval/words: few/loss", "min")
    assert Monitor.parse(str(monitor), "best") == monitor


@pytest.mark.parametrize("text", ["eval/loss", "eval/loss:low", ":min", "", 3, None])
def test_a_metric_without_its_mode_is_refused(text):
    said = f"EarlyStop({text!r}): give the name of the metric and its mode, as 'eval/loss:min'"
    with pytest.raises(OptionError, match=re.escape(said)):
        Monitor.parse(text, "EarlyStop()")


@pytest.mark.parametrize(
    ("mode", "value", "best", "better"),
    [
        ("min", 1.0, None, True), ("min", 1.0, 2.0, True), ("min", 2.0, 2.0, False), ("min", 3.0, 2.0, False),
        ("max", 1.0, None, True), ("max", 1.0, 2.0, False), ("max", 2.0, 2.0, False), ("max", 3.0, 2.0, True),
        ("min", NAN, None, False), ("min", NAN, 1.0, False), ("max", NAN, 1.0, False), ("max", math.inf, 1.0, True),
        ("min", 1.0, math.inf, True), ("min", math.inf, math.inf, False),
    ],
)  # fmt: skip
def test_better_is_lower_or_higher_and_nan_never_is(mode, value, best, better):
    assert Monitor("m", mode).is_better(value, best) is better


def test_an_improvement_may_have_to_exceed_a_difference_or_a_share():
    low, high = Monitor("m", "min"), Monitor("m", "max")
    assert [low.is_better(v, 4.0, min_delta=0.5) for v in (3.6, 3.5, 3.4)] == [False, False, True]
    assert [high.is_better(v, 4.0, min_delta=0.5) for v in (4.4, 4.5, 4.6)] == [False, False, True]
    assert [low.is_better(v, 4.0, threshold=0.25) for v in (3.1, 3.0, 2.9)] == [False, False, True]
    assert [high.is_better(v, 4.0, threshold=0.25) for v in (4.9, 5.0, 5.1)] == [False, False, True]


def test_the_best_come_first_and_what_is_no_number_is_left_out():
    rows = [{"m": 2.0}, {}, {"m": NAN}, {"m": 1.0}, {"m": "0"}, {"m": 1.0, "again": 1}, {"m": True}]
    assert Monitor("m", "min").ranked(rows, dict) == [rows[3], rows[5], rows[0]]
    assert Monitor("m", "max").ranked(rows, dict) == [rows[0], rows[3], rows[5]]


def test_a_metric_that_an_evaluation_lacks_is_named_with_the_nearest():
    said = "EarlyStop('eval/los:min'): the evaluation gave no 'eval/los'. Did you mean 'eval/loss'?"
    with pytest.raises(MetricError, match=re.escape(said)):
        Monitor("eval/los", "min").value({"eval/loss": 1.0, "eval/f1": 0.5}, "EarlyStop()")


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda: checked_int(0, "steps"), "steps=0: give a whole number of at least 1"),
        (lambda: checked_int(True, "steps"), "steps=True: give a whole number of at least 1"),
        (lambda: checked_int(2.0, "X(n=)", at_least=0), "X(n=2.0): give a whole number of at least 0"),
        (lambda: checked_int("2", "n", or_none=True), "n='2': give a whole number of at least 1, or None"),
        (lambda: checked_int(None, "n"), "n=None: give a whole number of at least 1"),
        (lambda: checked_number(0, "clip_norm", above=0), "clip_norm=0: give a number above 0"),
        (lambda: checked_number(NAN, "x", above=0), "x=nan: give a number above 0"),
        (lambda: checked_number(NAN, "x"), "x=nan: give a number"),
        (lambda: checked_number(True, "x", at_least=0), "x=True: give a number of at least 0"),
        (lambda: checked_number(1, "x", above=0, below=1), "x=1: give a number above 0 and below 1"),
        (lambda: checked_number(2, "x", at_least=0, at_most=1, what="a factor"),
         "x=2: give a factor of at least 0 and of at most 1"),
        (lambda: checked_choice("lnear", "shape", ("linear", None)),
         "shape='lnear' is not known: give one of 'linear', None. Did you mean 'linear'?"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused_in_one_wording(check, said):
    with pytest.raises(OptionError, match=f"^{re.escape(said)}$"):
        check()


def test_a_value_that_fits_is_given_back():
    assert checked_int(3, "n") == 3
    assert checked_int(None, "n", or_none=True) is None
    assert checked_number(0.5, "x", above=0, below=1) == 0.5
    assert checked_choice(None, "shape", ("linear", None)) is None

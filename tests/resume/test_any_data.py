"""Property: a run is what a hand-written loop computes, wherever it was stopped and resumed."""

from __future__ import annotations

import pytest

from tests.resume import any_data

QUICK, LONG = range(30), range(30, 330)


@pytest.mark.parametrize("number", QUICK)
def test_a_stopped_run_equals_an_uninterrupted_one_and_a_loop_by_hand(number, tmp_path):
    assert any_data.check(number, tmp_path) == []


def test_two_ranks_equal_a_loop_by_hand(pair):
    assert pair.call(any_data.check_all, list(range(12)), 2) == [[], []]


@pytest.mark.long
@pytest.mark.parametrize("number", LONG)
def test_many_stopped_runs(number, tmp_path):
    assert any_data.check(number, tmp_path) == []


@pytest.mark.long
def test_many_runs_on_two_ranks(pair):
    assert pair.call(any_data.check_all, list(range(12, 80)), 2) == [[], []]


def test_every_kind_is_drawn():
    assert {any_data.draw(number).kind for number in QUICK} == set(any_data.KINDS)

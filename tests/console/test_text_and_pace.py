from __future__ import annotations

import math

import pytest
from made_runs import made_run

from loopkit.console.eta import SpeedEstimate, epoch_text, estimate
from loopkit.console.text import byte_size, columns, cut, duration, number, pad, rate, width
from loopkit.durations import RunLength


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (0.12345, "0.1235"),
        (-2.5, "-2.5000"),
        (9999.0, "9999.0000"),
        (12345.6, "12,346"),
        (1e12, "1.000e+12"),
        (3e-4, "3.00e-04"),
        (-1e-9, "-1.00e-09"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (2**70, "1.181e+21"),
    ],
)
def test_numbers_read_well_at_any_size(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.9, "0:00"),
        (67, "1:07"),
        (3600, "1:00:00"),
        (3723.5, "1:02:03"),
        (90061, "1d 01:01:01"),
        (-1, "0:00"),
    ],
)
def test_durations_read_as_on_a_clock(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("per_second", "text"),
    [
        (None, "- it/s"),
        (12.34, "12.3 it/s"),
        (0.25, "4.00 s/it"),
        (12345.0, "12,345 it/s"),
    ],
)
def test_rates_turn_over_where_steps_are_slow(per_second, text):
    assert rate(per_second) == text


def test_sizes_have_the_unit_that_fits():
    sizes = (456, 38_440, 999_600, 12_345_678, 268_900_000, 1_204_000_000)
    assert [byte_size(size) for size in sizes] == [
        "456 B",
        "38.4 kB",
        "1.0 MB",
        "12.3 MB",
        "269 MB",
        "1.20 GB",
    ]


def test_wide_and_combining_characters_count_as_the_terminal_shows_them():
    assert [width(text) for text in ("abc", "🦊", "漢字", "e\u0301")] == [3, 2, 4, 1]
    assert pad("🦊", 4) == "🦊  "
    assert cut("漢字漢字", 5) == "漢字…"
    lines = columns([["🦊", "1"], ["ab", "22"]], [False, True])
    assert lines == ["🦊   1", "ab  22"]


def test_the_pace_follows_a_change_of_speed_within_seconds():
    pace = SpeedEstimate()
    pace.tick(0, 0.0)
    assert pace.rate is None
    now, step = 0.0, 0
    for _ in range(600):
        now, step = now + 0.1, step + 1
        pace.tick(step, now)
    assert pace.rate == pytest.approx(10.0)
    for _ in range(1200):
        now, step = now + 0.05, step + 1
        pace.tick(step, now)
    assert 19 < pace.rate < 20


def test_time_spent_evaluating_does_not_slow_the_pace():
    pace = SpeedEstimate()
    pace.restart(0, 0.0)
    pace.tick(10, 1.0)
    pace.restart(10, 500.0)
    pace.tick(20, 501.0)
    assert pace.rate == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("plan", "total", "done", "left"),
    [
        (RunLength(100, 400, 4), 400, 0.5, 20.0),
        (RunLength(100, None, 2.5), 250, 0.8, 5.0),
        (RunLength(None, None, None, 600.0), None, 0.1, 540.0),
        (RunLength(100, 400, 4, 65.0), 400, 60 / 65, 5.0),
        (RunLength(None, None, 3), None, None, None),
    ],
)
def test_the_limit_reached_first_tells_how_long_it_takes(plan, total, done, left):
    run = made_run(length=plan)
    run.progress.step, run.progress.seconds = 200, 60.0
    seen = estimate(run, 10.0)
    assert (seen.total, seen.done, seen.left) == (
        total,
        pytest.approx(done) if done else None,
        left,
    )


@pytest.mark.parametrize(
    ("plan", "epoch", "text"),
    [
        (RunLength(100, 400, 4), 0, "1/4"),
        (RunLength(100, 400, 4), 4, "4/4"),
        (RunLength(100, 250), 2, "3/3"),
        (RunLength(None, 1000), 2, "3"),
        (RunLength(100, None, 2.5), 1, "2/3"),
    ],
)
def test_the_epoch_under_way_is_counted_from_one(plan, epoch, text):
    run = made_run(length=plan)
    run.progress.epoch = epoch
    assert epoch_text(run) == text

"""What one rank requests, all do at the same step; an error of one rank is raised on all."""

from __future__ import annotations

import pytest

from tests.contract import coordination_jobs


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["stop", "save", "eval", "log", "end_epoch"])
def test_what_one_rank_requests_all_do_at_the_same_step(pair, tmp_path, what, rank):
    first, second = pair.call(coordination_jobs.requests, what, rank, tmp_path)
    assert first == second
    assert first["done"], "nothing was done"
    if what == "stop":
        assert first["result"] == ("stopped", f"rank {rank} has seen enough", 3)


def test_a_hook_of_one_rank_may_request_a_stop_after_an_evaluation(pair, tmp_path):
    first, second = pair.call(coordination_jobs.stops_after_evaluation, tmp_path)
    assert first == second == ("stopped", "good enough", 4)


def test_each_rank_may_log_what_it_likes(pair):
    first, second = pair.call(coordination_jobs.logs)
    assert first == second
    assert first["own/0"] == 10.0
    assert first["own/1"] == 11.0
    assert first["both"] == 0.5
    assert first["odd"] == 1.0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("how", ["loss", "gradient", "infinite"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_value_that_is_not_finite_on_one_rank_ends_all_before_the_update(
    pair, rank, how, precision
):
    if how == "gradient" and precision == "fp16":
        return  # A scaler skips such a step on all ranks.
    (told, changed), other = pair.call(coordination_jobs.not_finite, rank, how, "raise", precision)
    assert other == (told, changed)
    assert "step 3" in told
    # A gradient is known only as the sum over the ranks.
    assert f"on rank {rank}" in told or how == "gradient"
    assert not changed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_is_left_out_is_left_out_on_all_ranks(pair, rank):
    (skipped, digest), other = pair.call(
        coordination_jobs.not_finite, rank, "infinite", "skip", "fp32"
    )
    assert other == (skipped, digest)
    assert skipped == 1


def test_a_time_limit_goes_by_one_clock(pair):
    first, second = pair.call(coordination_jobs.timed)
    assert first == second
    assert 0 < first < 5000


def test_what_is_due_by_the_clock_is_done_in_time_though_control_syncs_are_rare(pair):
    (seconds, step, logs), other = pair.call(coordination_jobs.clocked)
    assert other[1:] == (step, logs)
    assert 2 <= seconds < 4
    assert 4 <= logs <= 8


def test_an_error_of_rank_0_is_raised_on_all_ranks(pair, tmp_path):
    (tmp_path / "file").write_text("")
    for told in pair.call(coordination_jobs.bad_directory, tmp_path / "file" / "run"):
        assert told.startswith("RunDirError")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_at_any_moment_ends_all_ranks_at_the_same_step(pair, rank):
    for moment in range(1, 16):
        first, second = pair.call(coordination_jobs.signal_after, rank, moment)
        assert first == second
        assert first[0] == "exit 143"


def test_ranks_sync_before_every_step_only_where_a_hook_may_request(pair):
    steps, tokens, samples = 21, sum(2 * (1 + n % 3) for n in range(41)), 82
    for told in pair.call(coordination_jobs.count_syncs, True):
        assert told[1:] == (steps, tokens, samples)
        assert (
            told[0] == steps + 4
        )  # and before and after what is due at the first step and the last
    clocked = pair.call(coordination_jobs.count_syncs, False, time="100 h", log_every="20 h")
    for told in (*pair.call(coordination_jobs.count_syncs, False), *clocked):
        assert told[1:] == (steps, tokens, samples)
        assert told[0] == 2 + 4  # how long a step takes is known after the first


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_between_two_control_syncs_is_handled_at_the_next(pair, tmp_path, rank):
    (how, saved), other = pair.call(coordination_jobs.signal_between_syncs, rank, 5, tmp_path)
    assert (how, saved) == other
    assert how == "exit 143"
    assert 5 <= saved[-1] < 150, "a second is about 50 steps"

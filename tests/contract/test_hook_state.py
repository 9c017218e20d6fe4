"""The state of a hook is that of rank 0, or that of each rank where the hook says so."""

from __future__ import annotations

import pytest

from loopkit.errors import CheckpointError
from tests.contract import hook_state_jobs as jobs
from tests.support import Tiny, quiet


@pytest.mark.parametrize("on", [(0, 1), (1,)])
def test_each_rank_gets_its_own_state_back(pair, tmp_path, on):
    whole = pair.call(jobs.walk, tmp_path / "whole", 6, on)
    assert whole[0] != whole[1]
    pair.call(jobs.walk, tmp_path / "cut", 3, on)
    assert pair.call(jobs.walk, tmp_path / "cut", 6, on, resume="auto") == whole
    with pytest.raises(CheckpointError, match="hook Walk by rank, of 2 ranks, which 1 cannot"):
        quiet(steps=6, resume=tmp_path / "cut", hooks=[jobs.Walk()]).run(Tiny())


def test_a_state_that_differs_unsaid_is_a_warning(pair, tmp_path):
    first, second = pair.call(jobs.warnings_of, tmp_path / "unsaid", "Unsaid")
    assert first == second
    assert all("the hook Unsaid on rank 1 is not that of rank 0" in text for text in first)
    assert all("per_rank_state = True" in text for text in first)
    assert first
    assert pair.call(jobs.warnings_of, tmp_path / "said", "Walk") == [[], []]

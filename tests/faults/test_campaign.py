"""The long campaign: hundreds of kills and full disks, each resumed to its end and compared."""

from __future__ import annotations

import pytest

from loopkit.hooks import EMA
from loopkit.testing import check_faults
from tests.support import Tiny, quiet


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_no_fault_costs_more_than_the_steps_since_the_last_save(seed):
    fit = quiet(
        epochs=3,
        batch_size=8,
        eval_every="5 steps",
        log_every="3 steps",
        hooks=[EMA(0.9)],
        seed=seed,
    )
    report = check_faults(
        Tiny(noisy=True),
        fit,
        steps=18,
        kills=100,
        full_disks=20,
        power_losses=2000,
        resumes=20,
        seed=seed,
    )
    assert report.resumes == 140

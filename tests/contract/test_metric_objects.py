"""loopkit's metrics over several ranks are those of one process."""

from __future__ import annotations

import pytest

from tests.contract import jobs, measured


@pytest.mark.parametrize("count", [1, 7, 20])
@pytest.mark.parametrize(("size", "batch_size"), [(2, 3), (3, 2)])
def test_every_metric_is_that_of_one_process(pool, size, batch_size, count):
    task = {"count": count}
    alone = jobs.evaluate("single", "measured", task, batch_size=4)
    names = {name.split("/")[1] for name in alone}
    assert names >= {"spans", "strict", "squad", "confidence", "classes", "rouge"}
    for found in pool(size).call(jobs.evaluate, "ddp", "measured", task, batch_size=batch_size):
        for name, value in alone.items():
            if name.split("/")[1] in ("confidence", "rouge"):  # means of numbers that are not whole
                assert found[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name
            elif "runtime" not in name and "per_second" not in name:
                assert found[name] == pytest.approx(value, rel=0, abs=0, nan_ok=True), name


def test_a_metric_that_rank_0_computes_alone_does_not_wait_for_the_others(pair):
    for told in pair.call(measured.on_rank_zero):
        assert "OnRankZero.compute_metrics called a collective" in told
        assert "sync_on_compute=False" in told
    assert pair.call(measured.on_rank_zero, sync=False) == [sum(range(20))] * 2

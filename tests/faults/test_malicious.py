"""Hostile checkpoints: nothing is imported, executed or opened outside, and memory stays bounded."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server

HERE = Path(__file__).resolve().parent


def campaign(mutations: int, seed: int, timeout: float = 240) -> dict[str, Any]:
    done = fork_server.run(
        [sys.executable, str(HERE / "malicious.py"), str(mutations), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_hostile_checkpoints_are_refused_and_run_nothing():
    found = campaign(200, 0)
    assert found["violations"] == []
    assert len(found["cases"]) >= 80
    assert [case for case, outcome in found["cases"].items() if outcome == "read"] == []
    # What is big by agreement is refused for its size; everything else is called corrupt.
    refused = {case for case, outcome in found["cases"].items() if outcome.startswith("refused")}
    assert all("agreed" in case for case in refused)
    assert found["mutations"] == 200
    assert found["read"] < 100


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_thousand_mutations_in_ten_parts(seed):
    found = campaign(2000, seed, timeout=800)
    assert found["violations"] == []
    assert found["mutations"] == 2000

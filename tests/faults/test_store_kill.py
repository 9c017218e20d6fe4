"""SIGKILL at every file operation of a save, of retention, of quarantine and of cleaning."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests import fork_server

HERE = Path(__file__).resolve().parent


def test_a_kill_at_any_operation_leaves_the_last_good_checkpoint_and_nothing_half():
    root = HERE.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = fork_server.run(
        [sys.executable, str(HERE / "kill_campaign.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout)
    # Fewer would mean that operations go past the store's door.
    least = {"save": 40, "first_save": 40, "retention": 20, "quarantine": 20, "cleaning": 10}
    assert all(counts[part] >= least[part] for part in least), counts

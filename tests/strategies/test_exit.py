"""What a run leaves when the interpreter ends: a thread of torch's can abort the process then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import atexit
import os
import sys


def tell():
    tasks = f"/proc/{os.getpid()}/task"
    names = {open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)}
    with open(f"threads-{os.environ.get('RANK')}", "w") as file:
        file.write(" ".join(names))


# What is registered first is called last.
atexit.register(tell)

from loopkit import TensorParallel
from tests.support import Tiny, quiet


def train(strategy):
    quiet(strategy=strategy, accelerator="cpu", devices=2, epochs=1, run_dir=None).run(Tiny())


if __name__ == "__main__":
    plan = {"net.0": "colwise", "net.3": "rowwise"}
    given = {"ddp": "ddp", "fsdp": "fsdp", "tensor": TensorParallel(plan)}
    train(given[sys.argv[1]])
    sys.exit(143)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tensor"])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the names of threads")
def test_no_thread_of_a_process_group_outlives_the_run(tmp_path, strategy):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    # Executed, not forked: a process that has imported more of torch would hide what holds a group.
    done = subprocess.run(
        [sys.executable, script, strategy],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 143, done.stderr
    for rank in ("None", "0", "1"):
        # Rank 0 may hold the store, whose thread knows nothing of Python.
        names = set((tmp_path / f"threads-{rank}").read_text().split()) - {"pt_tcpstore_uv"}
        assert all(name.startswith("python") for name in names), (rank, names)

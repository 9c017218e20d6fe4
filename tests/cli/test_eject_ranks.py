"""``loopkit eject`` for several ranks: torchrun runs the script, and the weights are those of fit."""

import os
import subprocess
import sys

import pytest

from loopkit.cli.main import main
from tests.cli.conftest import TASKS
from tests.cli.test_eject import CHARLM, DIGITS, VARIED, assert_equal
from tests.ranks import Ranks

WITHOUT_LOOPKIT = """
import runpy, sys

sys.modules["loopkit"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The last steps of an epoch have fewer samples on one rank, and none on the other.
RUNS = {
    "accumulated and clipped": f"{CHARLM} --steps 50 --batch-size 8 --width 32 --clip-norm 1.0 "
    "--accumulate 2",
    "bf16, uneven": f"{DIGITS} --steps 50 --batch-size 40 --precision bf16",
    "weights, samples on both": f"{VARIED}:Weighted --steps 50 --batch-size 8 "
    "--global-batch-size 32 --on-nan skip",
}


def fit_on_rank(options, run_dir):
    sys.path.insert(0, str(TASKS))
    fast = "--progress false --loggers false --eval-every never --checkpoint.every 1000"
    words = ["fit", *options.split(), "--strategy", "ddp", "--accelerator", "cpu"]
    return main([*words, *fast.split(), "--run-dir", run_dir])


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("name", RUNS)
def test_under_torchrun_two_ranks_give_the_weights_of_fit(loopkit, two_ranks, tmp_path, name):
    options = RUNS[name]
    words = [*options.split(), "--strategy", "ddp", "--accelerator", "cpu"]
    loopkit.ok("eject", *words, "--out", "script.py")
    (tmp_path / "runner.py").write_text(WITHOUT_LOOPKIT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "runner.py", "script.py", "--checkpoint", "script.pt"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert two_ranks.call(fit_on_rank, options, str(tmp_path / "run")) == [0, 0]
    assert_equal(tmp_path / "run", tmp_path / "script.pt")

"""``loopkit eject`` for several ranks: torchrun runs the script, and the weights are those of fit."""

import sys

import pytest

from loopkit.cli.main import main
from tests.cli.conftest import TASKS
from tests.cli.eject_scripts import (
    CHARLM,
    DIGITS,
    EMAIL,
    FAST,
    SENTIMENT,
    TAGGING,
    VARIED,
    assert_equal,
    run_on_ranks,
)  # fmt: skip

# The last steps of an epoch have fewer samples on one rank, and none on the other.
RUNS = {
    "charlm": f"{CHARLM} --steps 50 --batch-size 4 --width 16 --clip-norm 1.0 --accumulate 2 --folder {EMAIL}",
    "digits": f"{DIGITS} --steps 50 --batch-size 40 --precision bf16",
    "sentiment": f"{SENTIMENT} --steps 50 --batch-size 10 --width 16 --layers 1",
    "tagging": f"{TAGGING} --steps 50 --batch-size 5 --width 16 --layers 1 --accumulate 2",
    "weights, samples on both": f"{VARIED}:Weighted --steps 9 --batch-size 8 "
    "--global-batch-size 32 --on-nan skip",
}
ON_RANKS = ["--strategy", "ddp", "--accelerator", "cpu"]


def fit_on_rank(options, run_dir):
    sys.path.insert(0, str(TASKS))
    try:
        words = ["fit", *options.split(), *ON_RANKS, *FAST.split(), "--run-dir", run_dir]
        return main(words)
    finally:
        sys.path.remove(str(TASKS))


@pytest.mark.filterwarnings("ignore:.*BatchNorm")
@pytest.mark.parametrize("name", RUNS)
def test_under_torchrun_two_ranks_give_the_weights_of_fit(loopkit, pair, tmp_path, name):
    options, script, checkpoint = RUNS[name], tmp_path / "script.py", tmp_path / "script.pt"
    if name in ("sentiment", "tagging"):
        pytest.importorskip("transformers")
    loopkit.ok("eject", *options.split(), *ON_RANKS, "--out", str(script))
    run_on_ranks(script, checkpoint)
    assert pair.call(fit_on_rank, options, str(tmp_path / "run")) == [0, 0]
    assert_equal(tmp_path / "run", checkpoint)

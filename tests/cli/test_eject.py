"""``loopkit eject``: the script gives the weights of ``loopkit fit`` without loopkit, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopkit.checkpoint import load_snapshot
from loopkit.cli.eject.optimizer import optimizer_text
from tests.cli.conftest import TASKS

ROOT = Path(__file__).parents[2]
# Runs scripts one after the other, each in a process of its own that cannot import loopkit.
RUNNER = """
import json, os, runpy, sys
import torch, torchmetrics, sklearn.datasets
assert not any(name.split(".")[0] == "loopkit" for name in sys.modules)
sys.modules["loopkit"] = None
for script, *arguments in json.load(sys.stdin):
    child = os.fork()
    if not child:
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{script} {arguments} failed")
"""
CHARLM, DIGITS, SAM = (str(ROOT / "tasks" / f"{name}.py") for name in ("charlm", "digits", "sam"))
VARIED = str(TASKS / "varied.py")
FAST = "--progress false --loggers false --eval-every never"
# For each run: its target and options.
RUNS = {
    "charlm": f"{CHARLM} --steps 50 --batch-size 24 --clip-norm 1.0 --width 32",
    "charlm, bf16": f"{CHARLM} --steps 50 --batch-size 8 --precision bf16 --width 32",
    "digits": f"{DIGITS} --steps 50",
    "digits, accumulated": f"{DIGITS} --epochs 2 --batch-size 24 --accumulate 4 --clip-norm 0.5",
    "digits with wrong labels": f"{SAM}:NoisyDigits --rho 0 --steps 50 --data-seed 3",
    "dropout": f"{VARIED}:Classes --epochs 9 --batch-size 16 --seed 5",
    "a list as argument": f"{VARIED}:Classes --words [a,b] --hidden 5 --steps 50",
    "groups": f"{VARIED}:Groups --epochs 8 --batch-size 8 --accumulate 2 --clip-value 0.01",
    "frozen": f"{VARIED}:Frozen --epochs 7.5 --batch-size 16",
    "fp16": f"{VARIED}:Classes --steps 50 --precision fp16 --accumulate 2 --batch-size 20",
    "fp64": f"{VARIED}:Classes --steps 50 --precision fp64",
    "bf16-true": f"{VARIED}:Classes --steps 50 --precision bf16-true",
    "tf32, deterministic": f"{VARIED}:Classes --steps 50 --precision tf32 --deterministic",
    "limits": f"{VARIED}:Classes --steps 50 --batch-size 8 --limit-train 0.5 --on-nan skip",
    "one batch": f"{VARIED}:Classes --steps 50 --overfit 1 --on-nan ignore",
    "samples": f"{VARIED}:Read --how tuple --steps 50",
    "samples in accumulated steps": f"{VARIED}:Read --steps 50 --batch-size 8 --accumulate 3",
    "workers": f"{VARIED}:Read --how dict --steps 50",
    "padding": f"{VARIED}:Read --how padded --steps 50 --batch-size 8",
    "drawn by weight": f"{VARIED}:Read --how drawn --steps 50 --batch-size 8",
    "a DataLoader": f"{VARIED}:Read --how dataloader --steps 50",
    "weights": f"{VARIED}:Weighted --steps 50 --accumulate 3 --batch-size 10",
    "weights as tensors": f"{VARIED}:Weighted --kind tensor --steps 50 --accumulate 3 --batch-size 10",
    "torch's own": f"{VARIED}:Own --steps 50",
}  # fmt: skip


def run_scripts(*calls):
    """Run scripts with arguments in one interpreter, isolated from PYTHONPATH and this folder."""
    found = subprocess.run(
        [sys.executable, "-I", "-c", RUNNER],
        input=json.dumps(calls),
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def assert_equal(run_dir, checkpoint):
    """Compare the weights of a run directory with those of a script's checkpoint."""
    ours, theirs = load_snapshot(run_dir), torch.load(checkpoint, weights_only=True)
    assert ours.meta["step"] == theirs["step"]
    weights = ours.tensors["model"]
    assert weights.keys() == theirs["model"].keys()
    different = [n for n, w in weights.items() if not torch.equal(w, theirs["model"][n])]
    assert not different


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The scripts of all runs, and their checkpoints, in one folder."""
    from loopkit.cli.main import main

    folder = tmp_path_factory.mktemp("scripts")
    before = list(sys.path)
    sys.path.insert(0, str(TASKS))
    calls = []
    for number, options in enumerate(RUNS.values()):
        path = folder / f"{number}.py"
        assert main(["eject", *options.split(), "--out", str(path)]) == 0
        calls.append([str(path), "--checkpoint", str(folder / f"{number}.pt")])
    sys.path[:] = before
    run_scripts(*calls)
    return folder


@pytest.mark.filterwarnings("ignore:.*BatchNorm")
@pytest.mark.parametrize("name", RUNS)
def test_the_script_gives_the_weights_of_fit(loopkit, scripts, tmp_path, name):
    loopkit.ok("fit", *RUNS[name].split(), "--run-dir", "r", *FAST.split())
    assert_equal(tmp_path / "r", scripts / f"{list(RUNS).index(name)}.pt")

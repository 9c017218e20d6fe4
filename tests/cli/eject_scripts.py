"""Run ejected scripts where loopkit cannot be imported, in processes that have torch already."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path

import torch

from loopkit.checkpoint import load_snapshot
from tests import fork_server
from tests.cli.conftest import TASKS

ROOT = Path(__file__).parents[2]
CHARLM, CONTRASTIVE, DIFFUSION, DIGITS, DISTILL, GAN, IMAGES, PPO, QA, SAM, SENTIMENT, SUMMARIZE, TAGGING = (
    str(ROOT / "tasks" / f"{name}.py")
    for name in (
        "charlm", "contrastive", "diffusion", "digits", "distill", "gan", "images", "ppo", "qa", "sam",
        "sentiment", "summarize", "tagging",
    )
)  # fmt: skip
# A small part of the text that charlm reads by default.
EMAIL = os.path.join(sysconfig.get_path("stdlib"), "email")
LANGUAGE = str(ROOT / "tasks" / "language_model.py")
LORA = str(ROOT / "tasks" / "finetune_lora.py")
VARIED, WRAPPED = str(TASKS / "varied.py"), str(TASKS / "wrapped.py")
FAST = "--progress false --loggers false --eval-every never --checkpoint.every 1000"

WITHOUT_LOOPKIT = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] in ("loopkit", "tasks", "tests")]:
    del sys.modules[name]
sys.modules["loopkit"] = None
"""
# Runs scripts one after the other, each in a process of its own. Where `until` is given, the process
# is killed when it prints a line that begins so.
ONE_BY_ONE = f"""
{WITHOUT_LOOPKIT}
import json, os, runpy
calls = json.load(sys.stdin)
text = "".join(open(script).read() for _, script, *_ in calls)
if "sklearn" in text:  # once, and not in each child
    import sklearn.datasets
if "transformers" in text:
    from transformers import AutoTokenizer, BertForSequenceClassification, BertTokenizer
for until, script, *arguments in calls:
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writes, 1)
        sys.argv = [script, *arguments]
        sys.stdout = open(1, "w")
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as lines:
        for line in lines:
            if until and line.startswith(until):
                os.kill(child, 9)
    if os.waitpid(child, 0)[1] and not until:
        sys.exit(f"{{script}} {{arguments}} failed")
"""
# Runs one script.
ALONE = f"""
{WITHOUT_LOOPKIT}
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _run(words: list[str], given: str = "") -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = fork_server.run(
        words, input=given, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def run_scripts(*calls: list[str]) -> None:
    """Run (until, script, argument ...) in turn."""
    _run([sys.executable, "-c", ONE_BY_ONE], json.dumps(calls))


def run_on_ranks(script: Path, checkpoint: Path) -> None:
    """Run a script under torchrun, on two ranks."""
    runner = script.with_name("runner.py")
    runner.write_text(ALONE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    _run([*torchrun, str(runner), str(script), "--checkpoint", str(checkpoint)])


def assert_equal(run_dir: Path, checkpoint: Path) -> None:
    """Compare the weights of a run directory with those of a script's checkpoint."""
    ours, theirs = load_snapshot(run_dir), torch.load(checkpoint, weights_only=True)
    assert ours.meta["step"] == theirs["step"]
    weights = ours.tensors["model"]
    assert weights.keys() == theirs["model"].keys()
    different = [n for n, w in weights.items() if not torch.equal(w, theirs["model"][n])]
    assert not different

"""The real program: exit codes as a shell sees them, signals, pipes, and how fast it starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopkit.checkpoint.tools import list_checkpoints
from tests import fork_server

ROOT = Path(__file__).parents[2]
SHAPES = str(Path(__file__).parent / "tasks/shapes.py")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def program(*argv, cwd, run=subprocess.run, **more):
    return run(
        [sys.executable, "-m", "loopkit", *map(str, argv)],
        cwd=cwd,
        env=ENV,
        capture_output=True,
        text=True,
        **more,
    )


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom loopkit.cli.main import main\nmain(['--help']); main(['nothing'])\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env=ENV, stdout=subprocess.DEVNULL).returncode
        == 0
    )


def test_a_run_prints_its_result_on_stdout_alone(tmp_path):
    done = program("fit", SHAPES, "--progress", "plain", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runs/points/1" in done.stdout


def test_a_typo_is_one_line_and_2(tmp_path):
    done = program("fit", SHAPES, "--epoch_s", "3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "loopkit: there is no option --epoch_s. Did you mean '--epochs'?\n"


def _interrupted(tmp_path, number, popen=subprocess.Popen):
    ready = tmp_path / "ready"
    process = popen(
        [
            sys.executable,
            "-m",
            "loopkit",
            "fit",
            SHAPES,
            "--steps",
            "100000",
            "--pause",
            "0.02",
            "--run-dir",
            "r",
        ],
        cwd=tmp_path,
        env={**ENV, "POINTS_READY": str(ready)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not ready.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_ctrl_c_saves_and_ends_with_130_saying_how_to_continue(tmp_path):
    code, _, err = _interrupted(tmp_path, signal.SIGINT)
    assert code == 130, err
    step = list_checkpoints(tmp_path / "r")[-1].step
    assert re.search(
        rf"^Interrupted \(SIGINT\): {step} steps? in .*\nTo continue: loopkit resume r$", err, re.M
    )
    assert "saved r/checkpoints/step-" in err
    words = ["resume", "r", "--steps", step + 2, "--pause", "0"]
    done = program(*words, cwd=tmp_path, run=fork_server.run)
    assert done.returncode == 0, done.stderr
    assert list_checkpoints(tmp_path / "r")[-1].step == step + 2


def test_sigterm_saves_and_ends_with_143(tmp_path):
    code, _, err = _interrupted(tmp_path, signal.SIGTERM, popen=fork_server.Popen)
    assert code == 143, err
    assert list_checkpoints(tmp_path / "r")[-1].step >= 1


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path):
    command = (
        f"{sys.executable} -m loopkit predict {SHAPES} --form logits --batch_size 1 | head -n 1"
    )
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    assert len(json.loads(done.stdout)) == 2
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr

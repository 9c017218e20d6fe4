"""Real signals to a real process: it ends in order and resumes to the identical weights."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(run_dir: Path, *more: str, popen: Any = fork_server.Popen) -> subprocess.Popen[str]:
    return popen(
        [sys.executable, "-m", "tests.faults.slow_run", str(run_dir), *more],
        text=True,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.strip())
        if text in line:
            return lines
    raise AssertionError(
        f"{text!r} never came: {lines} {process.stderr.read() if process.stderr else ''}"
    )


def finish(process: subprocess.Popen[str], limit: float = 60) -> tuple[int, list[str], str]:
    out, err = process.communicate(timeout=limit)
    return process.returncode, out.splitlines(), err


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    """What an executed process ends with; the other processes of this file are forked."""
    process = start(tmp_path_factory.mktemp("whole"), popen=subprocess.Popen)
    code, lines, err = finish(process)
    assert code == 0, err
    return lines[-1].split()[-1]


def last_digest(run_dir: Path) -> str:
    code, lines, err = finish(start(run_dir))
    assert code == 0, err
    assert lines[-1].startswith("end finished"), lines
    return lines[-1].split()[-1]


def test_ctrl_c_saves_at_the_next_step_and_the_result_says_so(tmp_path, whole):
    process = start(tmp_path)
    read_until(process, "step 7")
    process.send_signal(signal.SIGINT)
    code, lines, err = finish(process)
    assert code == 0, err
    assert lines[-1].startswith("end interrupted SIGINT")
    step = int(lines[-1].split()[3])
    assert 7 <= step <= 9
    assert (tmp_path / "checkpoints" / f"step-{step:012}").is_dir()
    assert last_digest(tmp_path) == whole


def test_sigterm_saves_and_exits_143(tmp_path, whole):
    process = start(tmp_path)
    read_until(process, "step 6")
    began = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143, err
    assert time.perf_counter() - began < 15
    assert last_digest(tmp_path) == whole


def test_a_second_ctrl_c_gets_out_at_once(tmp_path, whole):
    process = start(tmp_path)
    read_until(process, "step 5")
    for _ in range(40):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    code, _, _ = finish(process)
    assert code in (0, 1, 130, -signal.SIGINT)
    assert last_digest(tmp_path) == whole


def test_sigusr1_saves_and_the_run_continues(tmp_path):
    process = start(tmp_path)
    read_until(process, "step 9")
    process.send_signal(signal.SIGUSR1)
    code, lines, err = finish(process)
    assert code == 0, err
    saved = [int(line.split("-")[1]) for line in lines if line.startswith("saved")]
    assert any(step % 4 for step in saved if step != 60), saved
    assert lines[-1].startswith("end finished")


def test_a_signal_while_the_data_never_comes_saves_the_last_committed_step(tmp_path, whole):
    process = start(tmp_path, "block")
    seen = read_until(process, "blocked")
    last = max(int(line.split()[1]) for line in seen if line.startswith("step"))
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process, limit=30)
    assert code == 143, err
    assert (tmp_path / "checkpoints" / f"step-{last:012}").is_dir()
    assert last_digest(tmp_path) == whole


def test_kill_9_at_any_time_loses_at_most_one_save_interval(tmp_path, whole):
    random.seed(0)
    killed = 0
    for _ in range(4):
        process = start(tmp_path)
        lines = read_until(process, "step")
        first = int(lines[-1].split()[1])
        assert first <= 1 or first % 4 == 1 or first > 4
        time.sleep(random.uniform(0.05, 0.4))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    assert last_digest(tmp_path) == whole

"""Contestants that train in turns, each in a process of its own.

What else the machine does slows all of them, and none finds the memory as another has left it. The
measuring process writes a line to a contestant for each turn, and waits for the line that it
answers: ``NEXT`` at the end of a turn, and at the end of a run what was measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from time import perf_counter

from benchmarks import record
from loopkit import cpu_memory

TURN = 0.08  # seconds: what slows the machine for a moment then slows all contestants
# Answers of a contestant's process.
NEXT = "next"  # its turn is over
MISSING = "missing"  # it cannot run, and has said why on stderr

TUNED = "by hand, tuned malloc"
# What its process gets besides: limits of glibc's malloc, as loopkit sets them for a run.
ENVIRONMENTS = {
    TUNED: {
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_MMAP_THRESHOLD_": str(cpu_memory.MOST_MMAP),
    }
}


class TurnClock:
    """Tells the seconds of this process's turns. At the end of a turn it waits for the next one.

    Args:
        wait: ends this turn, and returns when the next one begins.
        calls: how many looks at the clock a turn has; None ends a turn after ``seconds``.

    Attributes:
        seconds: how long a turn takes; it ends at the first look after that.
    """

    def __init__(self, wait: Callable[[], object], calls: int | None = None) -> None:
        self.seconds = TURN
        self._wait = wait
        self._calls = calls
        self._looks = 0
        self._began = perf_counter()
        self._waited = 0.0

    def __call__(self) -> float:
        """Return the seconds so far."""
        now = perf_counter()
        told = now - self._waited
        self._looks += 1
        ended = (
            now - self._began > self.seconds
            if self._calls is None
            else self._looks % self._calls == 0
        )
        if ended:
            self._wait()
            self._began = perf_counter()
            self._waited += self._began - now
        return told


def wait_for_turn() -> str:
    """Tell the measuring process that this turn is over, and return its line for the next one."""
    print(NEXT, file=sys.__stdout__, flush=True)  # a contestant may write into sys.stdout
    return sys.stdin.readline()


def rounds_of(title: str, commands: dict[str, list[str]], rounds: int) -> Iterator[tuple[str, str]]:
    """Yield a contestant and its answer, for each run of each round.

    Each round starts processes of its own: where the memory of a process lies can make all its steps
    some percent faster or slower than those of another process with the same program. A contestant
    that answers ``MISSING`` is left out from then on.

    Args:
        title: what is measured, for the line on stderr that shows the progress.
        commands: the command of each contestant's process.
        rounds: how many rounds there are.

    Raises:
        RuntimeError: the process of a contestant has ended.
    """
    left = dict(commands)
    for number in range(rounds):
        with ExitStack() as ends:
            runners = {
                name: ends.enter_context(answering(command, **ENVIRONMENTS.get(name, {})))
                for name, command in left.items()
            }
            for name, answer in in_turns(runners, record.rotated(runners, number), number):
                if answer == MISSING:
                    print(f"left out: {name}", file=sys.stderr)
                    del left[name]
                else:
                    yield name, answer
        print(f"\r{title}: round {number + 1} of {rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)


@contextmanager
def answering(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Inside, a process answers lines; it ends with its input."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, env={**os.environ, **environment}, text=True
    ) as process:
        assert process.stdin is not None
        try:
            yield process
        finally:
            with suppress(BrokenPipeError):  # it has ended by itself
                process.stdin.close()


def in_turns(
    runners: dict[str, subprocess.Popen[str]], order: Iterable[str], seed: int
) -> list[tuple[str, str]]:
    """Have each contestant of ``order`` train once, one at a time; return their last answers.

    Raises:
        RuntimeError: the process of a contestant has ended.
    """
    answers = dict.fromkeys(order, NEXT)
    while NEXT in answers.values():
        for contestant in [name for name, answer in answers.items() if answer == NEXT]:
            process = runners[contestant]
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):
                print(seed, file=process.stdin, flush=True)
            answers[contestant] = process.stdout.readline().strip()
            if not answers[contestant]:
                raise RuntimeError(f"{contestant} ended with exit code {process.wait()}")
    return list(answers.items())

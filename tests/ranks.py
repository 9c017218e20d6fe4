"""Ranks for tests: real processes over gloo, which stay from test to test as torch imports slowly."""

from __future__ import annotations

import importlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from tests import fork_server

ROOT = Path(__file__).parents[1]
# Seconds that the other ranks have to answer after one has failed.
GRACE = 30


class Popen(fork_server.Popen):
    """Forks with what the ranks of the contract tests import."""

    server = fork_server.Server(
        "accelerate",
        "deepspeed",
        "lightning.pytorch",
        "peft",
        "sklearn.datasets",
        "torch._inductor.compile_fx",
        "torchmetrics",
        "transformers",
    )


def run(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run`` by way of ``Popen``."""
    return fork_server.run(*args, popen=Popen, **kwargs)


class Ranks:
    """``size`` processes with torchrun's environment, which call functions of the tests together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self._store.port,
            "OMP_NUM_THREADS": 1,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "DS_ACCELERATOR": "cpu",
        }
        self._processes = [
            Popen(
                [sys.executable, "-m", "tests.ranks"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={
                    **os.environ,
                    **{n: str(v) for n, v in shared.items()},
                    "RANK": str(r),
                    "LOCAL_RANK": str(r),
                },
            )
            for r in range(size)
        ]

    def call(self, function: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Return what ``function``, found by its name, returned on each rank.

        Raises:
            AssertionError: it raised on one rank; with the traceback.
        """
        name = f"{function.__module__}:{function.__qualname__}"
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            torch.save((name, args, kwargs), file.name)
            for process in self._processes:
                process.stdin.write(f"{file.name}\n".encode())
                process.stdin.flush()
            answers = self._answers()
        for rank, answer in enumerate(answers):
            if answer and (error := json.loads(answer)[1]):
                raise AssertionError(f"rank {rank}:\n{error}")
        results = []
        for rank, answer in enumerate(answers):
            if not answer:
                code = self._processes[rank].poll()
                raise AssertionError(f"rank {rank} did not answer; its exit status is {code}")
            path, _ = json.loads(answer)
            results.append(torch.load(path, weights_only=False))
            os.unlink(path)
        return results

    def _answers(self) -> list[str]:
        """Read a line of each rank. One that failed may leave the others in a collective for ever."""
        answers = [""] * self.size
        limit = None
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
            while waiting.get_map():
                ready = waiting.select(limit)
                if not ready:
                    break
                for key, _ in ready:
                    waiting.unregister(key.fileobj)
                    answers[key.data] = key.fileobj.readline().decode()
                    if not answers[key.data] or json.loads(answers[key.data])[1]:
                        limit = GRACE
        return answers

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.wait()


def serve() -> None:
    """In a rank: call functions until the pipe is closed."""
    out = os.fdopen(os.dup(1), "w")
    # What a test prints is no answer.
    os.dup2(2, 1)
    from loopkit.distributed import failures, heartbeat

    # Errors are answers here. As no reporter is installed, each run would start another heartbeat.
    failures.FailureReporter.install = lambda self: None
    heartbeat.Heartbeat._send = lambda self: None
    for line in sys.stdin:
        name, args, kwargs = torch.load(line.strip(), weights_only=False)
        path, error = "", ""
        try:
            module, _, function = name.partition(":")
            result = getattr(importlib.import_module(module), function)(*args, **kwargs)
            handle, path = tempfile.mkstemp(suffix=".pt")
            os.close(handle)
            torch.save(result, path)
        except BaseException:
            error = traceback.format_exc()
        out.write(json.dumps([path, error]) + "\n")
        out.flush()


if __name__ == "__main__":
    serve()

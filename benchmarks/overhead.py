"""Cost of a training step besides the user's code: loopkit, two hand-written loops, the peers.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/overhead.py                      # two minutes on an idle machine
    python benchmarks/overhead.py --only loopkit --rounds 5

Every contestant trains the same model on the same prepared batches, in one process with one torch
thread. The contestants take turns, in short runs. The clock is in the user's code: the model
records the time of every call. A step lasts from one call to the next, so everything that the
framework does in between counts, in the same way for all.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


import torch

from benchmarks import by_hand, ours, peers, record
from benchmarks.job import LOG_EVERY, Job, Model

HAND = {"best hand-written loop": by_hand.best, "usual hand-written loop": by_hand.naive}
PEERS = {
    "lightning": peers.lightning, "transformers": peers.transformers, "accelerate": peers.accelerate,
    "fabric": peers.fabric, "ignite": peers.ignite, "torchtnt": peers.torchtnt,
}  # fmt: skip
CONTESTANTS: dict[str, Callable[[Job], None]] = {**HAND, "loopkit": ours.loopkit, **PEERS}
PACKAGES = (
    "torch",
    "loopkit-torch",
    "lightning",
    "transformers",
    "accelerate",
    "pytorch-ignite",
    "torchtnt",
)
BASE = "best hand-written loop"
# Steps of warmup, and measured blocks. A block is as long as the logging interval: it has one log.
WARMUP, BLOCKS = LOG_EVERY, 4


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard standard output, standard error and warnings inside the context."""
    nowhere = io.StringIO()
    with (
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def once(train: Callable[[Job], None], full: bool) -> tuple[list[float], torch.Tensor]:
    """Return µs per step of each block of one run, and the trained weights.

    Raises:
        RuntimeError: the contestant did not call the model once per step.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Job(WARMUP + BLOCKS * LOG_EVERY + 1, full, Path(folder))
        gc.collect()
        with quiet():
            train(job)
    stamps = job.model.stamps
    if len(stamps) != job.steps:
        raise RuntimeError(f"it took {len(stamps)} steps instead of {job.steps}")
    blocks = [(end - start) / LOG_EVERY * 1e6 for start, end in pairwise(stamps[WARMUP::LOG_EVERY])]
    return blocks, torch.cat([p.detach().flatten() for p in job.model.parameters()])


def measure(
    contestants: dict[str, Callable[[Job], None]], full: bool, rounds: int
) -> dict[str, list[list[float]]]:
    """Return the blocks of every round by contestant. The order of contestants rotates.

    A contestant that cannot run is left out, and one line on stderr says why.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in contestants}
    weights: torch.Tensor | None = None
    for number in range(-1, rounds):  # the first round imports and warms up
        for name in record.rotated(found, number):
            try:
                blocks, trained = once(contestants[name], full)
            except Exception as error:
                if number >= 0:
                    raise
                print(
                    f"left out: {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr
                )
                del found[name]
                continue
            weights = trained if weights is None else weights
            if not torch.allclose(trained, weights, rtol=1e-3, atol=1e-5):
                raise RuntimeError(
                    f"{name} trained to other weights than {next(iter(found))}: not the same job"
                )
            if number >= 0:
                found[name].append(blocks)
        print(
            f"\r{'everything on' if full else 'bare'}: round {number + 1} of {rounds}",
            end="",
            file=sys.stderr,
        )
    print(file=sys.stderr)
    return found


def summarise(found: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Return µs per step by contestant, alone and against the best loop of the same round."""
    base = [record.quartiles(blocks)["median"] for blocks in found[BASE]]
    summary = {}
    for name, rounds in found.items():
        each = [record.quartiles(blocks)["median"] for blocks in rounds]
        summary[name] = {
            "step": record.quartiles([block for blocks in rounds for block in blocks]),
            "over": record.quartiles([mine - best for mine, best in zip(each, base)]),
            "ratio": record.quartiles([mine / best for mine, best in zip(each, base)]),
        }
    return summary


def table(summary: dict[str, Any]) -> str:
    """Return the summary as lines of text, the fastest contestant first."""
    lines = [f"{'':26}{'µs/step':>10}{'over the best':>16}{'ratio':>8}   quartiles of µs/step"]
    for name, row in sorted(summary.items(), key=lambda item: item[1]["over"]["median"]):
        step, over, ratio = row["step"], row["over"]["median"], row["ratio"]["median"]
        quartiles = f"{step['low']:.1f} to {step['high']:.1f}"
        lines.append(f"{name:26}{step['median']:10.1f}{over:+16.1f}{ratio:8.2f}   {quartiles}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="µs per training step, side by side.")
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds of one short run each (default: %(default)s)"
    )
    parser.add_argument(
        "--only", metavar="NAME", action="append", help=f"{', '.join(CONTESTANTS)}; no results"
    )
    args = parser.parse_args()
    chosen = {
        n: f for n, f in CONTESTANTS.items() if args.only is None or n in args.only or n == BASE
    }
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    settings = {}
    for setting, full in (("bare", False), ("everything on", True)):
        settings[setting] = summarise(measure(chosen, full, args.rounds))
        print(f"\n{setting}\n{table(settings[setting])}\n")
    if args.only is None:
        parameters = sum(p.numel() for p in Model().parameters())
        about = {
            "rounds": args.rounds,
            "parameters": parameters,
            "versions": record.versions(PACKAGES),
        }
        record.save("overhead", {**about, "settings": settings})


if __name__ == "__main__":
    main()

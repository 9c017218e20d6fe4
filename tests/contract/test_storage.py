"""Ranks share the local copy of a run in a store, and rank 0 uploads what all of them wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from loopkit import Checkpoint
from tests.contract.jobs import make
from tests.storage.stores import held
from tests.support import Tiny, digest, quiet


def trained(strategy: str, place: Any, where: Path, staging: str, stop: int = 0) -> str:
    """Train on to a step, on a machine with this staging folder; the digest of the saved weights."""
    os.environ["LOOPKIT_STAGING"] = str(where / staging)
    fit = quiet(strategy=make(strategy), steps=6, batch_size=4, run_dir=place, resume="auto",
                checkpoint=Checkpoint(every=2, keep=2), eval_every="never")  # fmt: skip
    if stop:
        fit.on("step_end", lambda run, out: run.progress.step == stop and run.stop("here"))
    result = fit.run(Tiny(noisy=True))
    out = result.export(where / f"{staging}-{stop}")
    dist.barrier()
    del os.environ["LOOPKIT_STAGING"]
    return digest(load_file(out / "model.safetensors"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_of_two_ranks_moves_to_another_machine_with_the_same_bits(pair, tmp_path, strategy):
    url = f"file://{tmp_path}/store/run"
    pair.call(trained, strategy, url, tmp_path, "one", stop=3)
    assert held(url) == {f"step-{step:012d}": [] for step in (2, 3)}
    moved = pair.call(trained, strategy, url, tmp_path, "two")
    whole = pair.call(trained, strategy, tmp_path / "run", tmp_path, "three")
    assert len({*moved, *whole}) == 1
    assert held(url) == {f"step-{step:012d}": [] for step in (4, 6)}

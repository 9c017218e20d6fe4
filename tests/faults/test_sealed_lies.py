"""Checkpoints whose checksums are right and whose contents are not: each field that lies is named."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopkit import Checkpoint
from loopkit.checkpoint import digests
from loopkit.checkpoint.format import dump_json
from loopkit.checkpoint.manifest import checksum
from loopkit.checkpoint.tools import export_model, list_checkpoints
from loopkit.errors import CheckpointError, LoopkitError
from loopkit.hooks import EMA, EarlyStop
from loopkit.optim import AdamW, cosine
from tests.support import Tiny, quiet

LIES = [None, True, -1, 1.5, 10**30, 1e308, "x", "", [], {}, [1, 2, 3], {"x": 1}, {"$tensor": "x"}]
GONE = object()


class Logged(Tiny):
    """Tiny that collects values for the next log."""

    def train_step(self, batch):
        loss = super().train_step(batch)
        self.log("half", loss.detach() / 2)
        return loss

    def optimizers(self):
        return {"main": AdamW(lr=self.lr, schedule=cosine(warmup="10%"))}


def fit(run_dir: Path, **options: Any) -> Any:
    return quiet(
        batch_size=8,
        run_dir=run_dir,
        log_every="4 steps",
        eval_every="2 steps",
        hooks=[EMA(0.9), EarlyStop("eval/loss:min", patience=9)],
        checkpoint=Checkpoint(every="1000 steps", best="eval/loss:min", background=False),
        **options,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("saved")
    return fit(run_dir, steps=3).run(Logged()).checkpoint


def seal(checkpoint: Path, state: Any = None, change: Callable[[Any], None] | None = None) -> None:
    """Write a state, or change the manifest, and make all checksums agree."""
    raw = json.loads((checkpoint / "MANIFEST.json").read_text())
    if state is not None:
        data = json.dumps(state).encode()
        (checkpoint / "state.json").write_bytes(data)
        for record in raw["files"]:
            if record["path"] == "state.json":
                record.update(size=len(data), digest=digests.of(data))
    if change is not None:
        change(raw)
    raw["checksum"] = checksum(raw)
    (checkpoint / "MANIFEST.json").write_bytes(dump_json(raw))


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value[:2]) if isinstance(value, list) else inner
    return [place for key, item in inner for place in [(*above, key), *places(item, (*above, key))]]


def lie(value: Any, place: tuple[Any, ...], new: Any) -> None:
    for key in place[:-1]:
        value = value[key]
    if new is GONE:
        del value[place[-1]]
    else:
        value[place[-1]] = new


READERS: dict[str, Callable[[Path, Path], object]] = {
    "resume": lambda checkpoint, out: fit(out, steps=4, resume=checkpoint).run(Logged()),
    "load": lambda checkpoint, out: Logged.load(checkpoint),
    "evaluate": lambda checkpoint, out: quiet().evaluate(Logged(), checkpoint=checkpoint),
    "export": lambda checkpoint, out: export_model(checkpoint, out),
    "ema": lambda checkpoint, out: EMA(0.9).apply(Logged(), checkpoint),
    "ls": lambda checkpoint, out: [
        (e.kind, e.size, e.epoch, e.metrics) for e in list_checkpoints(checkpoint.parents[1])
    ],
}


def readings(saved: Path, place: Path, count: int, seed: int, where: str) -> dict[str, int]:
    """Tell ``count`` lies and read each in every way; how often it was refused, or did no harm."""
    chosen, outcomes = random.Random(seed), {"refused": 0, "read": 0}
    original = json.loads((saved / where).read_text())
    every = places(original)
    for number in range(count):
        told = chosen.choice(every), chosen.choice([*LIES, GONE])
        run_dir = place / f"{where}-{seed}-{number}"
        checkpoint = run_dir / "checkpoints" / saved.name
        shutil.copytree(saved, checkpoint)
        if where == "state.json":
            changed = json.loads(json.dumps(original))
            lie(changed, *told)
            seal(checkpoint, state=changed)
        else:
            seal(checkpoint, change=lambda raw, told=told: lie(raw, *told))
        for name, read in READERS.items():
            outcomes[outcome(name, read, checkpoint, run_dir / name, told)] += 1
        shutil.rmtree(run_dir)
    return outcomes


def outcome(name: str, read: Any, checkpoint: Path, out: Path, told: Any) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(checkpoint, out)
    except LoopkitError as error:
        if isinstance(error, CheckpointError) and str(checkpoint) not in str(error):
            raise AssertionError(f"{told}, {name}, no file is named: {error}") from error
        return "refused"
    except Exception as error:
        raise AssertionError(f"{told}, {name}: {error!r}") from error
    return "read"


@pytest.mark.parametrize(("where", "count"), [("state.json", 40), ("MANIFEST.json", 15)])
def test_a_lie_is_refused_by_name_or_does_no_harm(saved, tmp_path, where, count):
    outcomes = readings(saved, tmp_path, count, 0, where)
    assert outcomes["refused"] > count
    assert outcomes["read"] > 0


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", ["state.json", "MANIFEST.json"])
@pytest.mark.parametrize("seed", range(1, 5))
def test_thousands_of_lies(saved, tmp_path, where, seed):
    readings(saved, tmp_path, 500, seed, where)


@pytest.mark.parametrize(
    ("place", "new", "says"),
    [
        (("progress", "step"), "x", "state.json: progress.step: a whole number from 0"),
        (("progress", "step"), 2, "state.json: progress.step is 2, and MANIFEST.json says 3"),
        (("progress",), GONE, "state.json: progress is missing"),
        (("rng", "torch"), 1, "state.json: rng.torch: a tensor is expected"),
        (("optimizers", "main", "groups", 0, "params"), 5, "params: a list is expected"),
        (("hooks", "EarlyStop"), [], "state.json: hooks.EarlyStop: an object is expected"),
        (("metrics", "eval/loss"), "low", "state.json: metrics.eval/loss: a number"),
    ],
)
def test_the_message_names_file_and_field(saved, tmp_path, place, new, says):
    checkpoint = tmp_path / saved.name
    shutil.copytree(saved, checkpoint)
    state = json.loads((saved / "state.json").read_text())
    lie(state, place, new)
    seal(checkpoint, state=state)
    with pytest.raises(CheckpointError) as refused, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        READERS["resume"](checkpoint, tmp_path / "out")
    assert says in str(refused.value)


def test_a_number_out_of_range_is_no_json(saved, tmp_path):
    checkpoint = tmp_path / saved.name
    shutil.copytree(saved, checkpoint)
    text = (checkpoint / "MANIFEST.json").read_text().replace('"epoch":0', '"epoch":1e999')
    (checkpoint / "MANIFEST.json").write_text(text)
    with pytest.raises(CheckpointError, match="1e999 is out of range"):
        Logged.load(checkpoint)

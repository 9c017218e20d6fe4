"""Draws what the guides tell: the events of a step, memory, ranks, samples, and screens."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from loopkit import Checkpoint, Fit
from loopkit.events import EVENTS
from loopkit.plan.timeline import KINDS
from loopkit.run import Run
from tests.docs.drawing import COLOURS, Drawing, draw_both, page_code
from tests.docs.pages import DOCS, ROOT, blocks

WIDTH = 460  # pixels: text stays readable on a phone
ROW = 21.0

# ---- the loop ----

# What is done between two events.
_WORK = {
    ("step_start", "micro_step_end"): "forward and backward",
    ("micro_step_end", "micro_step_end"): "forward and backward",
    ("micro_step_end", "before_update"): "average, unscale and clip the gradients",
    ("before_update", "step_end"): "step of the optimizers, counters advance",
    ("eval_start", "eval_step_end"): "eval_step on a batch",
    ("eval_step_end", "log"): "compute the metrics",
}
# Where each bracket begins and ends, how it is called, and its column.
_BRACKETS = (("epoch_start", "epoch_end", "epoch", 0), ("eval_start", "eval_end", "evaluation", 1))


def first_epoch(trace: str) -> list[str]:
    """Return the events of the first epoch of a trace, with the evaluation at its end."""
    events = trace.split()
    start = events.index("epoch_start")
    return events[start : events.index("epoch_start", start + 1)]


def loop_drawing(events: Sequence[str], colours: dict[str, str]) -> Drawing:
    """Draw events from above, what is done between them, and what belongs together."""
    drawing = Drawing(WIDTH, f"The events of an epoch: {', '.join(events)}", colours)
    places: list[tuple[str, float]] = []
    y = 16.0
    for before, event in zip(("", *events), events):
        work = _WORK.get((before, event), "")
        if work:
            drawing.rect(84, y, WIDTH - 100, ROW - 3, colours["fill"], ' rx="4"')
            drawing.text(94, y + 13, work, "small")
            y += ROW
        drawing.text(84, y + 14, event, "code")
        if event == "commit":
            note = "the only point where a checkpoint is taken"
            drawing.text(150, y + 14, note, "small")
        places.append((event, y))
        y += ROW
    steps = 0
    for number, (event, top) in enumerate(places):
        if event == "step_start":
            steps += 1
            ends = next(at for name, at in places[number:] if name == "step_end")
            _bracket(drawing, f"step {steps}", 1, top, ends, COLOURS[1])
        for start, end, name, column in _BRACKETS:
            if event == start:
                ends = next(at for other, at in places[number:] if other == end)
                _bracket(drawing, name, column, top, ends, COLOURS[2 * column])
    return drawing


def _bracket(drawing: Drawing, name: str, column: int, top: float, end: float, colour: str) -> None:
    x, height = 12 + 34 * column, end + ROW - top
    drawing.rect(x, top, 24, height - 3, colour, ' rx="5" fill-opacity=".22"')
    middle = top + height / 2
    drawing.text(
        x + 16, middle, name, "small",
        f' text-anchor="middle" transform="rotate(-90 {x + 16:g} {middle:g})"',
    )  # fmt: skip


def loop() -> None:
    """The events of an epoch of two steps, as the trace of the page has them."""
    events = first_epoch(page_code("loop.md", 1)["trace"].seen)
    draw_both("loop", lambda colours: loop_drawing(events, colours))


# ---- hooks ----


def stopped() -> list[tuple[str, str]]:
    """Return the events of the last step of a run that a hook stops, and what the hooks do between.

    The hooks are those of the page. What they do is ("print", text) or ("run.stop", reason).
    """
    with redirect_stdout(io.StringIO()):
        code = page_code("hooks.md", 1)
    seen: list[tuple[str, str]] = []

    class Said(io.StringIO):
        def write(self, text: str) -> int:
            if text.strip():
                seen.append(("print", text))
            return len(text)

    def stop(run: Run, reason: str) -> None:
        seen.append(("run.stop", reason))
        run.end("stopped", reason)

    methods: dict[str, Any] = {
        f"on_{event}": lambda self, run, *given, event=event: seen.append((event, ""))
        for event in EVENTS
    }
    methods["optimizers"] = lambda self: code["AdamW"](lr=0.0)  # the loss stays as it is
    task = type("Watched", (code["Small"],), methods)
    with TemporaryDirectory() as folder, redirect_stdout(Said()), redirect_stderr(io.StringIO()):
        fit = Fit(
            epochs=9, hooks=[code["Patience"]()], run_dir=folder, progress=False,
            checkpoint=Checkpoint(background=False),
        )  # fmt: skip
        fit.on("step_end", every="2 steps")(code["show"])
        with mock.patch.object(Run, "stop", stop):
            assert fit.run(task()).status == "stopped"
    return seen[max(at for at, (event, _) in enumerate(seen) if event == "step_start") :]


def hooks_drawing(seen: Sequence[tuple[str, str]], colours: dict[str, str]) -> Drawing:
    """Draw events from above, and in boxes what the hooks do at each."""
    drawing = Drawing(WIDTH, "The last step of a run that a hook stops", colours)
    y = 16.0
    for event, text in seen:
        if text:
            colour = COLOURS[event == "run.stop"]
            drawing.rect(12, y, WIDTH - 24, ROW - 3, colour, ' rx="4" fill-opacity=".25"')
            hook = {"print": "show", "run.stop": "Patience"}[event]
            drawing.text(20, y + 13, f"{hook}: {event}({text!r})", "code")
        else:
            drawing.text(20, y + 14, event, "code")
        y += ROW
    return drawing


def hooks() -> None:
    """The events of the last step of a run, and what the two hooks of the page do."""
    seen = stopped()
    draw_both("hooks", lambda colours: hooks_drawing(seen, colours))


# ---- a task ----

_CALLS = ("run", "evaluate", "test", "predict")
_METHODS = (
    "configure_model", "train_data", "eval_data", "test_data", "predict_data", "optimizers",
    "metrics", "loops", "train_step", "eval_step", "test_step", "predict_step",
)  # fmt: skip


def calls() -> dict[str, dict[str, int]]:
    """Return how often each call of Fit calls each method of a task, by method and call."""
    with redirect_stdout(io.StringIO()):
        code = page_code("task.md", 1)
    letters: Any = code["Letters"]
    now = ""
    found: dict[str, dict[str, int]] = {}

    class Whole(letters):  # type: ignore[misc]
        def test_data(self) -> Any:
            return code["Loader"](code["WORDS"][:10], collate_fn=code["spell"])

        def predict_step(self, batch: Any) -> Any:
            return self.net(batch.clamp(min=0))

    def counted(name: str) -> Any:
        @wraps(getattr(Whole, name))
        def method(self: Any, *given: Any) -> Any:
            found.setdefault(name, dict.fromkeys(_CALLS, 0))[now] += 1
            return getattr(super(task, self), name)(*given)

        return method

    task = type("Counted", (Whole,), {name: counted(name) for name in _METHODS})
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        given = task()
        fit = Fit(epochs=2, accumulate=2, run_dir=folder, progress=False)
        for now in _CALLS:
            getattr(fit, now)(given)
    return found


def calls_drawing(found: dict[str, dict[str, int]], colours: dict[str, str]) -> Drawing:
    """Draw a row for each method and a column for each call of Fit, with the counts."""
    drawing = Drawing(WIDTH, "How often each call of Fit calls each method of a task", colours)
    left, cell = 140, 77
    middle = ' text-anchor="middle"'
    for column, call in enumerate(_CALLS):
        drawing.text(left + cell * column + 35, 24, f"fit.{call}", "small", middle)
    for row, (name, counts) in enumerate(found.items()):
        y = 34 + (ROW + 3) * row
        drawing.text(14, y + 15, name, "code")
        for column, count in enumerate(counts.values()):
            if count:
                x = left + cell * column
                edge = ' rx="5" fill-opacity=".25"'
                drawing.rect(x, y, cell - 6, ROW, COLOURS[column], edge)
                drawing.text(x + 35, y + 15, str(count), "code", middle)
    return drawing


def task() -> None:
    """Which methods of a task each call of Fit calls, and how often."""
    found = calls()
    draw_both("task", lambda colours: calls_drawing(found, colours))


# ---- memory ----


@dataclass
class Bar:
    """A planned step.

    Attributes:
        name: what is typed, or the strategy.
        parts: bytes by what they are for.
    """

    name: str
    parts: dict[str, int]


_MODEL = "gpt.py --width 768 --depth 12 --no-savings --json --batch-size"


def planned(folder: Path, name: str, options: str) -> Bar:
    """Plan the model of plan.md with some options: ``loopkit plan`` in this process."""
    from loopkit.cli.main import main

    before, path, said = Path.cwd(), list(sys.path), io.StringIO()
    os.chdir(folder)
    try:
        with redirect_stdout(said):
            code = main(["plan", *_MODEL.split(), *shlex.split(options)])
    finally:
        os.chdir(before)
        sys.path[:] = path
    assert code == 0, said.getvalue()
    return Bar(name, json.loads(said.getvalue())["parts"])


def plans(wanted: Sequence[tuple[str, str]]) -> list[Bar]:
    """Return a bar for each name and its options."""
    (block,) = (b for b in blocks(DOCS / "plan.md") if b.title == "gpt.py")
    with TemporaryDirectory() as name:
        (Path(name) / "gpt.py").write_text(block.text, encoding="utf-8")
        bars = [planned(Path(name), label, options) for label, options in wanted]
    sys.modules.pop("gpt", None)  # another folder may have one
    return bars


def bars_drawing(bars: Sequence[Bar], about: str, colours: dict[str, str]) -> Drawing:
    """Draw bars one below the other, each with its name and its sum above it."""
    drawing = Drawing(WIDTH, about, colours)
    most = max(sum(bar.parts.values()) for bar in bars)
    used = [kind for kind in KINDS if any(bar.parts.get(kind, 0) > most / 200 for bar in bars)]
    y, wide = 12.0, WIDTH - 32
    for at, kind in enumerate(used):
        x = 16.0 + 145 * (at % 3)
        drawing.rect(x, y + 18 * (at // 3), 11, 11, COLOURS[KINDS.index(kind)], ' rx="2"')
        drawing.text(x + 17, y + 10 + 18 * (at // 3), kind, "small")
    y += 18 * (1 + (len(used) - 1) // 3) + 8
    for bar in bars:
        total = sum(bar.parts.values())
        drawing.text(16, y + 13, bar.name, "code")
        drawing.text(WIDTH - 16, y + 13, f"{total / 1e9:.1f} GB", "bold", ' text-anchor="end"')
        x = 16.0
        for kind in used:
            width = wide * bar.parts.get(kind, 0) / most
            drawing.rect(x, y + 19, width, 16, COLOURS[KINDS.index(kind)])
            x += width
        y += 45
    return drawing


MEMORY = (
    ("Fit()", "32"),
    ('precision="bf16"', "32 --precision bf16"),
    ('precision="bf16-true"', "32 --precision bf16-true"),
    ('activation_checkpointing="full"', "32 --activation-checkpointing full"),
    ("batch_size=8, accumulate=4", "8 --accumulate 4"),
    ('all but "bf16"', "8 --accumulate 4 --precision bf16-true --activation-checkpointing full"),
)
_PLAN = "{blocks.*.up: colwise, blocks.*.down: rowwise}"
STRATEGIES = (
    ("single", "8 --strategy single"),
    ("ddp", "8 --strategy ddp --devices 4"),
    ("fsdp", "8 --strategy fsdp --devices 4"),
    ("TensorParallel(plan, size=4)", f"8 --strategy TensorParallel --strategy.size 4 --devices 4 --strategy.plan '{_PLAN}'"),
)  # fmt: skip


def memory() -> None:
    """What a step of a small language model needs, with one option each."""
    bars = plans(MEMORY)
    draw_both(
        "memory", lambda colours: bars_drawing(bars, "Memory of a step, by what it is for", colours)
    )


def strategies() -> None:
    """What each of four ranks holds under each strategy."""
    bars = plans(STRATEGIES)
    draw_both(
        "strategies",
        lambda colours: bars_drawing(bars, "Memory of a step on each of four ranks", colours),
    )


# ---- data ----

_SAMPLES = """
import os, sys
import torch
from torch import nn
from torch.utils.data import Dataset
from loopkit import Fit, Task
from loopkit.optim import SGD

class Numbers(Dataset):
    def __len__(self): return 24
    def __getitem__(self, index): return torch.tensor([float(index)])

class Seen(Task):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.rows = []
    def train_step(self, batch):
        batch = batch if torch.is_tensor(batch) else batch["x"].float()[:, None]
        self.rows.append([int(x) for x in batch.flatten()])
        return self.net(batch).square().mean()
    def optimizers(self): return SGD(lr=0.0)
    def train_data(self): return Numbers()
    def on_step_end(self, run, out):
        with open(f"seen-{run.progress.step}-{run.rank}", "w") as file:
            file.write(" ".join(map(str, self.rows[-1])))
        if run.progress.step == stop:
            run.stop("here")

devices, stop = map(int, sys.argv[1:])
Fit(devices=devices, strategy="ddp", accelerator="cpu", batch_size=2, run_dir="run", resume="auto",
    loggers=None, progress=False).run(Seen())
"""
_STREAM = """__import__("datasets").Dataset.from_dict({"x": list(range(24))}).to_iterable_dataset(
        num_shards=4).shuffle(seed=0, buffer_size=8).with_format("torch")"""
STOPPED = 3


def samples(read: str = "Numbers()") -> dict[tuple[int, int], list[int]]:
    """Return the samples by step and rank: three steps on two ranks, and the rest on three.

    Args:
        read: the data, as Python.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        code = _SAMPLES.replace("Numbers()", read)
        (folder / "seen.py").write_text(code, encoding="utf-8")
        for arguments in (f"2 {STOPPED}", "3 0"):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "seen.py", *arguments.split()]
            subprocess.run(command, cwd=folder, env=environment, check=True)
        found = {}
        for path in folder.glob("seen-*"):
            step, rank = map(int, re.findall(r"\d+", path.name))
            found[step, rank] = [int(word) for word in path.read_text().split()]
    assert sorted(chain.from_iterable(found.values())) == list(range(24))
    return found


def data_drawing(found: dict[tuple[int, int], list[int]], colours: dict[str, str]) -> Drawing:
    """Draw a column for each step, with the samples of each rank."""
    drawing = Drawing(
        WIDTH, "The samples of each step and rank, before and after a resume", colours
    )
    last = max(step for step, _ in found)
    cell, left, top = 70.0, 66.0, 56.0
    gap = WIDTH - left - cell * last - 12
    for step in range(1, last + 1):
        x = left + cell * (step - 1) + (gap if step > STOPPED else 0)
        drawing.text(x + cell / 2 - 3, top - 8, f"step {step}", "small", ' text-anchor="middle"')
        for rank in sorted(rank for at, rank in found if at == step):
            colour = COLOURS[step > STOPPED]
            drawing.rect(x, top + 34 * rank, cell - 6, 28, colour, ' rx="5" fill-opacity=".25"')
            numbers = "  ".join(map(str, found[step, rank]))
            drawing.text(
                x + cell / 2 - 3, top + 34 * rank + 19, numbers, "code", ' text-anchor="middle"'
            )
    for rank in range(1 + max(rank for _, rank in found)):
        drawing.text(12, top + 34 * rank + 19, f"rank {rank}", "small")
    drawing.text(left, 20, "2 devices", "bold")
    drawing.text(left + cell * STOPPED + gap, 20, "resumed on 3", "bold")
    return drawing


def data() -> None:
    """The samples that each rank reads, before and after a resume on another number of ranks."""
    found = samples()
    draw_both("data", lambda colours: data_drawing(found, colours))


def streams() -> None:
    """The samples of a shuffled stream, before and after a resume on another number of ranks."""
    found = samples(_STREAM)
    draw_both("streams", lambda colours: data_drawing(found, colours))


PICTURES: dict[str, Callable[[], Any]] = {
    "data": data,
    "hooks": hooks,
    "loop": loop,
    "memory": memory,
    "strategies": strategies,
    "streams": streams,
    "task": task,
}

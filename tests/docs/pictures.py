"""Draws the pictures of the pages from real runs: ``python -m tests.docs.pictures [name ...]``.

Each has a light and a dark form, but the recording of a terminal, which is dark.
"""

from __future__ import annotations

import json
import runpy
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.docs import guide_pictures, guide_screens
from tests.docs.drawing import (
    COLOURS,
    FOLDER,
    Drawing,
    digits,
    draw_both,
    page_code,
    plot,
    python,
)
from tests.docs.pages import DOCS, blocks
from tests.docs.terminal import Recording, Screen


def recording() -> None:
    """A run, Ctrl-C, and its resume, as a terminal shows them."""
    film = Recording(Screen(64))
    typed = "fit digits.py --epochs 10 --hidden 384 --batch-size 8 --run-dir runs/digits"
    with digits() as folder:
        code = film.loopkit(folder, typed, press=lambda text: "    5     8" in text)
        assert code == 130, film.screen.text()
        assert film.loopkit(folder, "resume runs/digits") == 0, film.screen.text()
    film.see(6.0)
    (FOLDER / "recording.svg").write_text(
        film.svg("A run is interrupted with Ctrl-C and resumed"), encoding="utf-8"
    )


_RESUMED = """
import os, signal, sys
from digits import Digits
from loopkit import Fit
import torch
torch.manual_seed(0)
fit = Fit(epochs=8, batch_size=64, run_dir=sys.argv[1], resume="auto", progress=False,
          log_every=1, checkpoint=__import__("loopkit").Checkpoint(every="20 steps"))
if at := int(sys.argv[2]):
    fit.on("step_end", lambda run, out: run.progress.step == at and os.kill(os.getpid(), signal.SIGKILL))
fit.run(Digits())
"""
KILLS = (57, 113)


def resumed() -> None:
    """The losses of a run that was killed twice, on those of one that was not."""
    with digits() as folder:
        python(folder, _RESUMED, "whole", "0")
        for step in KILLS:
            python(folder, _RESUMED, "killed", str(step), ends=-signal.SIGKILL)
        python(folder, _RESUMED, "killed", "0")
        rows = {name: _losses(folder / name) for name in ("whole", "killed")}
    assert rows["whole"] == rows["killed"]

    def draw(axes: Any, colours: dict[str, str]) -> None:
        steps, losses = zip(*rows["whole"])
        axes.plot(steps, losses, color=COLOURS[0], lw=4, alpha=0.45, label="never stopped")
        bounds = (0, *KILLS, len(steps))
        for number, (start, end) in enumerate(pairwise(bounds)):
            steps, losses = zip(*rows["killed"][start:end])
            label = None if number else "killed twice, and resumed"
            axes.plot(steps, losses, color=COLOURS[1], lw=1.2, label=label)
        for step in KILLS:
            axes.axvline(step, color=colours["line"], ls="--", lw=1)
            axes.annotate(
                f"killed at step {step}", (step, max(losses) * 0 + 1.9), xytext=(6, 0),
                textcoords="offset points", color=colours["text"], fontsize=9,
            )  # fmt: skip
        axes.set(xlabel="step", ylabel="training loss", ylim=(0, None))
        axes.legend(frameon=False, labelcolor=colours["text"])

    plot("resumed", draw)


def _losses(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def schedules() -> None:
    """The schedules of loopkit.optim over 1000 steps."""
    from loopkit import optim

    made = {
        'cosine(warmup="10%")': optim.cosine(warmup="10%"),
        'linear(warmup="10%")': optim.linear(warmup="10%"),
        'wsd(warmup="10%", decay="20%")': optim.wsd(warmup="10%", decay="20%"),
        "one_cycle()": optim.one_cycle(),
        'inverse_sqrt(warmup="10%")': optim.inverse_sqrt(warmup="10%"),
        "cosine_restarts(cycles=3)": optim.cosine_restarts(cycles=3),
    }
    rates = {name: _rates(schedule) for name, schedule in made.items()}

    def draw(axes: Any, colours: dict[str, str]) -> None:
        for colour, (name, values) in zip((*COLOURS[:5], COLOURS[6]), rates.items()):
            axes.plot(values, label=name, color=colour, lw=1.8)
        axes.set(xlabel="step of 1000", ylabel="learning rate, of its peak", ylim=(0, 1.05))
        axes.figure.legend(
            frameon=False,
            labelcolor=colours["text"],
            loc="outside lower center",
            ncols=2,
            fontsize=8,
            handlelength=1.2,
        )

    plot("schedules", draw, size=(5.2, 4.0))


def _rates(schedule: Any) -> list[float]:
    """Return the rates that a run of 1000 steps sets."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from loopkit import Fit, Task
    from loopkit.optim import SGD

    class Still(Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def train_step(self, batch: Any) -> Any:
            return self.net(batch[0]).mean()

        def optimizers(self) -> Any:
            return SGD(lr=1.0, schedule=schedule)

        def train_data(self) -> Any:
            return TensorDataset(torch.zeros(1000, 1))

    seen: list[float] = []
    fit = Fit(batch_size=1, progress=False, loggers=None, checkpoint=False)
    fit.on(
        "step_end",
        lambda run, out: seen.append(run.optimizers["main"].param_groups[0]["lr"]),
    )
    fit.run(Still())
    return seen


def confusion() -> None:
    """The confusion matrix of First ten minutes."""
    import torch

    from loopkit import Fit

    with digits() as folder:
        found = runpy.run_path(str(folder / "digits.py"))
        torch.manual_seed(0)
        task = found["Digits"]()
        fit = Fit(epochs=2, run_dir=folder / "run", progress=False)
        fit.run(task)
        predicted = fit.predict(task)
        target = task.eval_data().tensors[1]
    counts = torch.zeros(10, 10, dtype=torch.long)
    for true, named in zip(target.tolist(), predicted.tolist()):
        counts[true, named] += 1

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.imshow(counts, cmap="Blues", vmax=int(counts.max()) * 1.3)
        for true in range(10):
            for named in range(10):
                count = int(counts[true, named])
                if count:
                    dark = count > counts.max() * 0.7
                    colour = "#ffffff" if dark else "#24292f"
                    axes.text(
                        named, true, count, ha="center", va="center", color=colour, fontsize=9
                    )
        axes.set(xlabel="predicted", ylabel="true", xticks=range(10), yticks=range(10))

    plot("confusion", draw, size=(4.6, 4.2), grid=False)


def benchmarks() -> None:
    """Bars of the cost of a step, from benchmarks/results."""
    from benchmarks import record

    settings = record.results()["overhead"]["settings"]
    everything = {name: row["step"]["median"] for name, row in settings["everything on"].items()}
    bare = {name: row["step"]["median"] for name, row in settings["bare"].items()}
    names = sorted(everything, key=lambda name: -everything[name])

    def draw(axes: Any, colours: dict[str, str]) -> None:
        for offset, values, colour, label in (
            (0.2, everything, COLOURS[0], "everything on"),
            (-0.2, bare, "#9ecae1", "bare"),
        ):
            at = [number + offset for number in range(len(names))]
            bars = axes.barh(at, [values[name] for name in names], 0.38, color=colour, label=label)
            axes.bar_label(bars, fmt="%.0f", padding=3, color=colours["text"], fontsize=8)
        axes.set_yticks(range(len(names)), names)
        for tick in axes.get_yticklabels():
            tick.set_fontweight("bold" if tick.get_text() == "loopkit" else "normal")
        axes.set(xlabel="µs per step: shorter is better", xlim=(0, 1.12 * max(everything.values())))
        axes.legend(frameon=False, labelcolor=colours["text"])

    plot("benchmarks", draw, size=(5.2, 4.8))


def find_lr() -> None:
    """The curve of the learning-rate test on the digits."""
    import torch

    from loopkit import Fit
    from loopkit.hooks import FindLR

    with digits() as folder:
        found = runpy.run_path(str(folder / "digits.py"))
        torch.manual_seed(0)
        finder = FindLR()
        Fit(run_dir=folder / "run", progress=False, hooks=[finder]).run(found["Digits"]())
    rates, losses, smooth = zip(*finder.rows)
    assert finder.suggestion is not None

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.plot(rates, losses, color=COLOURS[0], lw=0.8, alpha=0.6, label="loss")
        axes.plot(rates, smooth, color=COLOURS[0], lw=1.8, label="smoothed")
        axes.axvline(finder.suggestion, color=COLOURS[1], ls="--")
        axes.annotate(
            f"suggestion: {finder.suggestion:.2g}", (finder.suggestion, max(losses) * 0.9),
            xytext=(-6, 0), textcoords="offset points", color=colours["text"], fontsize=9, ha="right",
        )  # fmt: skip
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.legend(frameon=False, labelcolor=colours["text"])

    plot("find-lr", draw)


def seeds() -> None:
    """Mean and range over seeds, as the recipe computes them."""
    curves = page_code("recipes.md")["curves"]

    def draw(axes: Any, colours: dict[str, str]) -> None:
        for colour, (lr, losses) in zip(COLOURS, curves.items()):
            epochs = range(1, 1 + losses.shape[1])
            axes.plot(epochs, losses.mean(0), color=colour, label=f"lr={lr}")
            axes.fill_between(epochs, losses.amin(0), losses.amax(0), color=colour, alpha=0.2)
        axes.set(xlabel="epoch", ylabel="validation loss", xticks=list(epochs))
        axes.legend(frameon=False, labelcolor=colours["text"])

    plot("seeds", draw)


_WAYS = """
import json
from loopkit.hooks import Unfreeze

def curve(task, **options):
    fit = Fit(epochs=15, batch_size=8, checkpoint=False, progress=False, **options)
    rows = fit.run(task).history
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]

torch.manual_seed(0)
found = {"the whole model, from scratch": curve(Rings(classes=2, samples=40))}
frozen = pretrained()
frozen.body.requires_grad_(False).eval()
frozen.optimizers = lambda: AdamW(lr=1e-2, params=frozen.head)
found["the whole model, pretrained body"] = curve(pretrained())
found["Unfreeze after 5 epochs"] = curve(pretrained(), hooks=[Unfreeze({"5 epochs": "body"})])
found["a lower rate for the body"] = curve(pretrained(body_lr=1e-3))
found["the head alone"] = curve(frozen)
print("found:" + json.dumps(found))
"""


def fine_tuning() -> None:
    """The accuracy after each epoch, for each way of the page."""
    code = [b.text for b in blocks(DOCS / "fine-tuning.md") if b.language == "python"][:2]
    with TemporaryDirectory() as folder:
        said = python(Path(folder), "\n".join([*code, _WAYS]))
    curves = json.loads(said.partition("found:")[2])

    def draw(axes: Any, colours: dict[str, str]) -> None:
        for colour, (name, values) in zip(COLOURS, curves.items()):
            axes.plot(range(1, 1 + len(values)), values, label=name, color=colour, lw=1.8)
        axes.set(xlabel="epoch", ylabel="accuracy on new points", ylim=(None, 1.01))
        axes.legend(frameon=False, labelcolor=colours["text"], fontsize=9, loc="lower right")

    plot("fine-tuning", draw, size=(5.2, 3.6))


# Name, text, place and size.
_BOXES = (
    ("Task", ("your nn.Module:", "train_step, eval_step,", "metrics, optimizers, data"), 12, 236, 206, 104),
    ("Fit", ("options in, result out:", ".run(task), .evaluate, .predict"), 12, 12, 436, 84),
    ("Loops", ("epoch, step, evaluation, prediction:", "short, public, and yours to replace"), 12, 124, 436, 84),
    ("Hooks", ("listen to events: early", "stop, averages, loggers,", "monitors, your functions"), 242, 236, 206, 104),
    ("Strategy", ("one device, DDP, FSDP, tensor parallel, DeepSpeed;", "precision; sharded state"), 12, 384, 436, 84),
)  # fmt: skip
# Text, where it begins, and the arrow.
_ARROWS = (
    ("runs", 240, 115, (230, 96, 230, 122)),
    ("calls", 116, 227, (106, 208, 106, 234)),
    ("events", 286, 227, (276, 208, 276, 234)),
    ("requests", 386, 227, (376, 236, 376, 210)),
    ("forward, backward, update", 242, 366, (230, 208, 230, 382)),
)


def diagram() -> None:
    """Task, Fit, Loops, Hooks and Strategy, and what passes between them."""
    draw_both("diagram", _diagram)


def _diagram(colours: dict[str, str]) -> Drawing:
    drawing = Drawing(
        460,
        "Fit runs the loops. The loops call the task, send events to hooks, and compute through "
        "the strategy.",
        colours,
    )
    for colour, (name, lines, x, y, width, height) in zip(COLOURS, _BOXES):
        edge = f' rx="8" stroke="{colour}" stroke-width="2"'
        drawing.rect(x, y, width, height, colours["fill"], edge)
        drawing.text(x + 14, y + 28, name, "title")
        for number, line in enumerate(lines):
            drawing.text(x + 14, y + 50 + 18 * number, line)
    for text, x, y, ends in _ARROWS:
        drawing.arrow(*ends)
        drawing.text(x, y, text, "small")
    return drawing


PICTURES: dict[str, Callable[[], None]] = {
    "benchmarks": benchmarks,
    "confusion": confusion,
    "diagram": diagram,
    "find-lr": find_lr,
    "fine-tuning": fine_tuning,
    "recording": recording,
    "resumed": resumed,
    "schedules": schedules,
    "seeds": seeds,
    **guide_pictures.PICTURES,
    **guide_screens.PICTURES,
}


def main(names: list[str]) -> None:
    """Draw the pictures of these names, or all."""
    for name in names or PICTURES:
        PICTURES[name]()
        print("drawn:", name)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What one plain step costs, counted exactly: frames, calls, device reads, attribute loads."""

from __future__ import annotations

import dis
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import loopkit
from loopkit import Checkpoint, Hook
from loopkit.loops import EpochLoop
from loopkit.metrics import accumulator
from tests.support import Tiny, points, quiet

HOME = str(Path(loopkit.__file__).parent)


class Plain(Tiny):
    """Tiny on a list of batches, with torch's own optimizer."""

    def optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    def train_data(self) -> Any:
        return [points(240)[8 * i : 8 * i + 8] for i in range(30)]


class Indexed(Plain):
    def train_data(self) -> Any:
        return points(240)


def framework_calls(task_class: type[Tiny], **options: Any) -> list[str]:
    """The names of loopkit's functions called between the train_step of step 10 and that of step
    11.
    """
    calls: list[str] = []

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            calls.append(
                frame.f_code.co_qualname
                if hasattr(frame.f_code, "co_qualname")
                else frame.f_code.co_name
            )

    class Counted(task_class):
        seen = 0

        def train_step(self, batch: Any) -> Any:
            self.seen += 1
            if self.seen == 11:
                sys.setprofile(None)
            loss = super().train_step(batch)
            if self.seen == 10:
                sys.setprofile(note)
            return loss

    try:
        quiet(batch_size=8, eval_every="never", **options).run(Counted())
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("data", [Plain, Indexed])
def test_a_plain_step_makes_at_most_20_framework_calls(data):
    calls = framework_calls(data)
    assert 10 < len(calls) <= 20, calls
    by_the_clock = framework_calls(data, epochs=1, time="1 h", log_every="10 min")
    assert len(by_the_clock) == len(calls) + 1, by_the_clock  # which is to look at the clock


def test_a_step_passes_at_most_4_frames_in_3_files_to_train_step():
    frames: list[Any] = []

    class Looking(Plain):
        def train_step(self, batch: Any) -> Any:
            if not frames:
                frame = sys._getframe(1)
                while (
                    frame is not None
                    and frame.f_code.co_name
                    != "test_a_step_passes_at_most_4_frames_in_3_files_to_train_step"
                ):
                    frames.append(frame.f_code)
                    frame = frame.f_back
            return super().train_step(batch)

    quiet(eval_every="never").run(Looking())
    assert all(code.co_filename.startswith(HOME) for code in frames)
    assert len(frames) <= 4, [code.co_name for code in frames]
    assert len({code.co_filename for code in frames}) <= 3
    assert frames[-1].co_name == "run"
    assert frames[-1].co_filename.endswith("fit.py")


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


class Reads:
    """Counts calls that read a tensor's value, as a context."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Reads:
        self.originals = {name: getattr(torch.Tensor, name) for name in READS}
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, self._counted(original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, original)

    def _counted(self, original: Any) -> Any:
        def reading(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        return reading


@pytest.mark.parametrize("on_nan", ["raise", "skip", "ignore"])
def test_between_log_boundaries_nothing_reads_the_device(on_nan, tmp_path, monkeypatch):
    # The device of this test is the CPU, whose scalars are read at once, as no device's are.
    monkeypatch.setattr(accumulator, "_read_cpu", lambda tensor: tensor)
    counts: dict[int, int] = {}
    with Reads() as reads:
        fit = quiet(
            log_every=10,
            clip_norm=1.0,
            on_nan=on_nan,
            eval_every="never",
            loggers=("jsonl", "tensorboard"),
            progress="plain",
            checkpoint=Checkpoint(every="1 epoch"),
            run_dir=tmp_path,
            accumulate=2,
        )
        fit.on(
            "step_start", lambda run, batches: counts.__setitem__(run.progress.step, reads.count)
        )
        fit.run(Plain())
    after = {step: counts[step] - counts[step - 1] for step in list(counts)[1:]}
    assert {step for step, reads in after.items() if reads} <= {1, 10}, after
    assert after[10] > 0, "the log itself must read, or this test counts nothing"


def test_an_event_nobody_listens_to_costs_one_attribute_load():
    instructions = [
        i
        for i in dis.get_instructions(EpochLoop.run)
        if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")
    ]
    guarded = 0
    for at, instruction in enumerate(instructions):
        if instruction.argval in ("step_start", "step_end") and instruction.opname == "LOAD_ATTR":
            following = instructions[at + 1]
            if (
                "POP_JUMP" in following.opname or following.argval is None
            ):  # tested for None at once, nothing built before
                guarded += 1
    assert guarded == 2

    class Silent(Hook):
        pass

    events = loopkit.events.Events([Plain(), Silent(), Hook()])
    assert all(getattr(events, name) is None for name in loopkit.events.EVENTS)


def test_only_overridden_events_are_called():
    calls: list[str] = []

    class One(Hook):
        def on_step_end(self, run: Any, out: Any) -> None:
            calls.append("end")

    events = loopkit.events.Events([One(), Hook()])
    assert events.step_start is None
    events.step_end(None, {})
    assert calls == ["end"]


def test_a_run_on_a_cpu_keeps_no_tensor_of_a_past_step():
    """A small tensor that stays among the large ones of its step makes the process grow."""
    alive: list[int] = []

    class Counting(Plain):
        def train_step(self, batch: Any) -> Any:
            gc.collect()
            alive.append(sum(isinstance(item, torch.Tensor) for item in gc.get_objects()))
            return super().train_step(batch)

    quiet(batch_size=8, eval_every="never", epochs=1, log_every="never").run(Counting())
    assert len(set(alive[10:])) == 1, alive

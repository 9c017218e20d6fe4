from __future__ import annotations

import io
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from made_runs import Clock, evaluate, made_run, take_step
from terminals import in_terminal, screen_of

import loopkit
from loopkit.console.rich_progress import RichProgress, Screen
from loopkit.durations import RunLength


def shown(clock: Clock, width: int = 100, **fields: object) -> tuple[object, io.StringIO]:
    file = io.StringIO()
    console = Screen(
        file=file,
        force_terminal=True,
        width=width,
        height=30,
        color_system=None,
        legacy_windows=False,
    )
    return made_run(RichProgress(console=console, clock=clock), **fields), file


def frames(text: str) -> list[str]:
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in text.split("\r")]


def test_the_bar_shows_epoch_step_speed_time_and_the_last_values():
    clock = Clock()
    run, file = shown(
        clock, metrics={"train/loss": 0.75, "lr": 3e-4, "eval/accuracy": 0.9, "eval/runtime": 3.0}
    )
    run.events.fit_start(run)
    for _ in range(150):
        take_step(run, clock, 0.125)
    run.events.fit_end(run)
    last = frames(file.getvalue())[-1].splitlines()
    assert re.fullmatch(r"Epoch 2/4  ━+─+ 150/400  8.0 it/s  0:18 < 0:31", last[0])
    assert last[0].count("━") / len(re.findall("[━─]", last[0])) == pytest.approx(
        150 / 400, abs=0.02
    )
    assert last[1] == "           loss 0.7500   lr 3.00e-04   eval/accuracy 0.9000"
    assert last[2] == "Finished: 150 steps in 0:18"


def test_redraws_are_bounded_by_the_clock_and_a_step_in_between_costs_one_look_at_it():
    clock = Clock()
    run, _ = shown(clock)
    drawn = []
    hook = run.events.step_end.__self__
    draw = hook._draw
    hook._draw = lambda *args: (drawn.append(1), draw(*args))
    run.events.fit_start(run)
    drawn.clear()
    before = clock.reads
    for _ in range(10_000):
        take_step(run, clock, 0.001)
    assert 36 <= len(drawn) <= 40  # four a second
    assert clock.reads - before == 10_000 + len(drawn)  # which measures what a drawing takes
    run.events.fit_end(run)


def test_an_evaluation_has_a_bar_of_its_own_and_leaves_a_row():
    clock = Clock()
    run, file = shown(clock, width=110)
    run.events.fit_start(run)
    take_step(run, clock, 1.0)
    evaluate(run, clock, loss=0.5, accuracy=0.25)
    run.events.fit_end(run)
    text = "\n".join(frames(file.getvalue()))
    assert re.search(r"Evaluating +━+─+ [56]/8 batches", text)
    assert text.count("Validation Loss") == 1
    assert re.search(r"^ +0.01 +1 +- +0.5000 +0.2500 +0.40 s +2,500 \* *$", text, re.MULTILINE)
    assert "Evaluating" not in text[text.rindex("Epoch 1/4") :]


def test_no_frame_is_wider_than_the_screen():
    clock = Clock()
    run, file = shown(clock, width=60, metrics={f"eval/{n}": n / 7 for n in range(30)})
    run.events.fit_start(run)
    for _ in range(20):
        take_step(run, clock, 0.5)
    assert (
        max(len(line) for frame in frames(file.getvalue())[1:] for line in frame.splitlines()) <= 60
    )


@pytest.mark.parametrize(
    "plan",
    [
        RunLength(),
        RunLength(None, None, 3),
        RunLength(None, None, None, 60.0),
        RunLength(10, 5, 0.5),
    ],
)
def test_any_plan_can_be_drawn(plan):
    clock = Clock()
    run, _ = shown(clock, length=plan)
    run.events.fit_start(run)
    for _ in range(20):
        take_step(run, clock, 0.5)
    run.events.fit_end(run)


def test_other_ranks_are_silent():
    clock = Clock()
    run, file = shown(clock, rank=1)
    run.events.fit_start(run)
    for _ in range(30):
        take_step(run, clock, 1.0)
    evaluate(run, clock, loss=1.0)
    run.events.fit_end(run)
    assert file.getvalue() == ""


def test_no_tensor_is_read(monkeypatch):
    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_: pytest.fail("a tensor was read"))
    clock = Clock()
    run, _ = shown(clock)
    run.events.fit_start(run)
    for _ in range(50):
        take_step(run, clock, 1.0)
    evaluate(run, clock, loss=1.0)
    run.events.fit_end(run)


def test_an_error_stops_the_bar_and_gives_the_streams_back():
    clock = Clock()
    run, file = shown(clock)
    stdout, stderr = sys.stdout, sys.stderr
    run.events.fit_start(run)
    take_step(run, clock, 1.0)
    run.events.error(run, KeyboardInterrupt())
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("─")
    assert file.getvalue().endswith(
        "\x1b[?25hLeft in step 2, which is not saved; there is no checkpoint\n"
    )
    length = len(file.getvalue())
    take_step(run, clock, 1.0)
    assert len(file.getvalue()) == length


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), BrokenPipeError(), ValueError("closed file")]
)
def test_a_terminal_that_is_gone_stops_the_bar_and_nothing_else(error):
    clock = Clock()
    run, file = shown(clock)
    stdout, stderr = sys.stdout, sys.stderr
    run.events.fit_start(run)

    def gone(text: str) -> int:
        raise error

    file.write = gone
    for _ in range(10):
        take_step(run, clock, 1.0)
    evaluate(run, clock, loss=1.0)
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    run.events.fit_end(run)


def test_a_closed_pipe_does_not_end_the_program(tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {script(tmp_path, 'rich')} 3>&1 1>&3 2> >(exit 0)"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "over" in done.stdout


def script(folder: Path, kind: str, ending: str = "run.events.fit_end(run)") -> Path:
    """A program with a run whose steps take 5 ms."""
    path = folder / "program.py"
    body = f"""
        import sys, time, warnings
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(loopkit.__file__).parents[1])]!r}
        from made_runs import made_run
        from loopkit.console import build_progress
        from loopkit.durations import RunLength
        run = made_run(build_progress({kind!r}), length=RunLength(50, 100, 2), metrics={{"train/loss": 0.5}})
        run.events.fit_start(run)
        for step in range(100):
            time.sleep(0.005)
            run.progress.step += 1
            run.events.step_end(run, {{}})
            if step == 30:
                print("printed")
            if step == 60:
                warnings.warn("warned")
        {ending}
        print("over")
    """
    path.write_text(textwrap.dedent(body))
    return path


def test_on_a_real_terminal_prints_and_warnings_stand_above_one_bar(tmp_path):
    text, code = in_terminal([sys.executable, str(script(tmp_path, "auto"))])
    assert code == 0, text
    lines = [line for line in screen_of(text) if line]
    bars = [place for place, line in enumerate(lines) if line.startswith("Epoch ")]
    assert len(bars) == 1, lines
    assert lines[bars[0]].split("━")[-1].split()[0] == "100/100"
    above = lines[: bars[0]]
    assert "printed" in above
    assert "UserWarning:warned" in "".join(above).replace(" ", "")  # the terminal wraps a long path
    assert lines[bars[0] + 1].strip() == "loss 0.5000"
    assert lines[-1] == "over"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert text.count("Epoch ") <= 3 + 10 * 3


def test_on_a_real_terminal_an_unforeseen_exit_leaves_it_sane(tmp_path):
    text, code = in_terminal(
        [sys.executable, str(script(tmp_path, "auto", "raise RuntimeError('boom')"))]
    )
    assert code == 1
    assert any(line.startswith("RuntimeError: boom") for line in screen_of(text))
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_even_a_killed_run_leaves_the_cursor_visible(tmp_path):
    ending = "import os; os.kill(os.getpid(), 9)"
    text, code = in_terminal([sys.executable, str(script(tmp_path, "auto", ending))])
    assert code == -9
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_what_is_printed_to_a_file_goes_there_and_not_to_the_terminal(tmp_path):
    with open(tmp_path / "out.txt", "wb") as out:
        text, code = in_terminal(
            [sys.executable, str(script(tmp_path, "auto"))], stdout=out.fileno()
        )
    assert code == 0
    assert (tmp_path / "out.txt").read_text() == "printed\nover\n"
    assert "printed" not in screen_of(text)

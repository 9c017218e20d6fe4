"""What a person sees: whole runs on terminals of several widths, a dumb one, and a pipe."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from terminals import in_terminal, screen_of

from tests import fork_server

RUN = [sys.executable, "-m", "tests.console.watched_run"]


def watched(run_dir: Path, *ending: str, **terminal: object) -> list[str]:
    """The lines on the screen at the end of a run; "interrupt" and "leave" press Ctrl-C in step 7."""
    text, _ = in_terminal([*RUN, str(run_dir), *ending], **terminal)
    return screen_of(text)


def row_of(lines: list[str], step: int) -> str:
    return next(line for line in lines if re.match(rf" *[\d.]+ +{step} ", line))


@pytest.mark.parametrize(
    ("columns", "metrics", "more", "under_the_bar"),
    [
        (60, [], "+3 more", r"loss [\d.]+   accuracy [\d.]+   \+5 more"),
        (80, ["Accuracy", "Macro f1"], "+1 more", r"loss .*accuracy .*lr 1.25e-04 .*\+4 more"),
        (200, ["Accuracy", "Macro f1", "Weighted f1"], "", r"loss .*eval/weighted_f1 [\d.]+"),
    ],
    ids=["60", "80", "200"],
)
def test_a_run_fits_its_terminal(columns, metrics, more, under_the_bar, tmp_path):
    lines = watched(tmp_path, columns=columns)
    end = next(place for place, line in enumerate(lines) if line.startswith("Finished: 16 steps"))
    assert max(len(line) for line in lines[:end] if "pytest" not in line) <= columns
    header = next(line for line in lines if line.startswith("Epoch    Step"))
    assert all(name in header for name in metrics)
    assert ("Samples/s" in header) == (columns == 200)
    assert more in header
    assert row_of(lines, 16).endswith("*")
    bars = [place for place, line in enumerate(lines) if re.match(r"Epoch \d/", line)]
    assert len(bars) == 1
    assert re.fullmatch(r"Epoch 2/2  ━+ 16/16  .* it/s  0:0\d < 0:00", lines[bars[0]])
    assert re.fullmatch(rf" {{11}}{under_the_bar}", lines[bars[0] + 1])


def test_the_training_loss_is_the_mean_since_the_row_before(tmp_path):
    """Step 1 alone is logged before the first row: it has the mean of four steps all the same."""
    done = fork_server.run([*RUN, str(tmp_path)], capture_output=True, text=True, timeout=60)
    losses = [float(x) for x in re.findall(r"^step loss (.*)$", done.stdout, re.MULTILINE)]
    shown = {step: float(row_of(done.stderr.splitlines(), step).split()[2]) for step in (4, 8, 16)}
    for step, loss in shown.items():
        assert loss == pytest.approx(sum(losses[step - 4 : step]) / 4, abs=1e-4)


@pytest.mark.parametrize("where", ["dumb", "pipe"])
def test_without_a_terminal_that_moves_its_cursor_there_are_plain_lines(where, tmp_path):
    if where == "dumb":
        text, code = in_terminal([*RUN, str(tmp_path)], columns=80, term="dumb")
    else:
        done = fork_server.run([*RUN, str(tmp_path)], capture_output=True, text=True, timeout=60)
        text, code = done.stderr, done.returncode
    assert code == 0, text
    assert "\x1b" not in text
    lines = text.replace("\r", "").splitlines()
    table = next(place for place, line in enumerate(lines) if line.startswith("Epoch    Step"))
    assert ("+1 more" in lines[table]) == (where == "dumb")
    assert ("Samples/s" in lines[table]) == (where == "pipe")
    if where == "dumb":
        assert max(map(len, lines[table : table + 3])) <= 80
    assert re.search(
        r"^step 16/16 \(100%\) \| epoch 2/2 \| loss [\d.]+ \| accuracy [\d.]+", text, re.M
    )


def test_ctrl_c_is_answered_within_the_step_and_again_leaves_at_once(tmp_path):
    once = watched(tmp_path / "once", "interrupt")
    heard = "Ctrl-C: finishing step 7, its state is saved then. Ctrl-C again leaves at once"
    assert once.index(heard) < once.index("the step continues")
    assert f"saved {tmp_path}/once/checkpoints/step-000000000007" in once
    continues = f"To continue: the same with Fit(run_dir='{tmp_path}/once', resume='auto')"
    assert once.index("Interrupted (SIGINT): 7 steps in 0:00") + 1 == once.index(continues)
    twice = watched(tmp_path / "once", "again")
    assert f"  resumed  {tmp_path}/once/checkpoints/step-000000000007, at step 7" in twice
    left = watched(tmp_path / "left", "leave", columns=120)
    assert heard in left
    assert "Left in step 7, which is not saved; the newest checkpoint is" in "".join(left)
    assert "the step continues" not in left


def test_a_save_that_takes_long_is_on_the_screen(tmp_path):
    text, _ = in_terminal([*RUN, str(tmp_path)])
    assert "saving the state of step 16 …" in text
    assert "saving" not in "".join(screen_of(text))

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from loopkit.errors import LoopkitWarning, MissingExtraError
from loopkit.hooks import curves as curves_module
from loopkit.hooks.curves import Curves, draw_curves

HISTORY = [
    {"step": 10, "train/loss": 2.0, "lr": 0.1, "train/grad_norm": 1.0, "epoch": 0.1},
    {"step": 20, "train/loss": 1.0, "lr": 0.2, "train/grad_norm": float("inf"), "epoch": 0.2},
    {
        "step": 20,
        "eval/loss": 1.5,
        "eval/accuracy": 0.5,
        "eval/runtime": 0.1,
        "eval/samples_per_second": 9.0,
    },
    {"step": 30, "train/loss": float("nan"), "lr": 0.1, "train/grad_norm": 0.5},
]


def made(run_dir: Path | None, rank: int = 0, history: object = HISTORY) -> SimpleNamespace:
    return SimpleNamespace(
        strategy=SimpleNamespace(rank=rank), run_dir=run_dir, history=history, task=object()
    )


def is_png(path: Path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")


def test_the_picture_is_drawn_after_an_evaluation_and_at_the_end(tmp_path):
    pytest.importorskip("matplotlib")
    hook, run = Curves(), made(tmp_path)
    hook.on_setup(run)
    hook.on_eval_end(run, {})
    assert is_png(tmp_path / "curves.png")
    (tmp_path / "curves.png").unlink()
    hook.on_fit_end(run)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert is_png(tmp_path / "curves.png")


def test_what_belongs_together_shares_a_panel():
    panels = curves_module._panels(curves_module._series(HISTORY))
    assert {name: sorted(curves) for name, curves in panels.items()} == {
        "Loss": ["eval/loss", "train/loss"],
        "Metrics": ["eval/accuracy"],
        "Learning rate": ["lr"],
        "Gradient norm": ["train/grad_norm"],
    }
    assert panels["Loss"]["train/loss"][0] == [10, 20, 30]


@pytest.mark.parametrize("history", [[], [{"step": 1, "epoch": 0.1}]])
def test_nothing_logged_is_no_picture(tmp_path, history):
    Curves().on_fit_end(made(tmp_path, history=history))
    assert list(tmp_path.iterdir()) == []


def test_names_that_matplotlib_would_read_as_something_else_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {
            "step": 1,
            "eval/$x_{": 1.0,
            "eval/_hidden": 2.0,
            "eval/🦊": 3.0,
            "eval/..": 1e300,
            "eval/": -1.0,
        }
    ]
    draw_curves(rows, tmp_path / "deep" / "c.svg")
    assert "<svg" in (tmp_path / "deep" / "c.svg").read_text()


def test_drawing_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch):
    now, drawn = [0.0], []

    def draw(*_, **__):
        now[0] += 2.0
        drawn.append(now[0])

    monkeypatch.setattr(curves_module, "draw_curves", draw)
    hook, run = Curves(clock=lambda: now[0]), made(tmp_path)
    for _ in range(100):
        now[0] += 1.0
        hook.on_eval_end(run, {})
    assert len(drawn) == 5
    hook.on_fit_end(run)
    assert len(drawn) == 6


@pytest.mark.parametrize("run", [made(None), made(Path("/nowhere"), rank=1)])
def test_other_ranks_and_runs_without_a_directory_draw_nothing(run):
    Curves().on_fit_end(run)


def test_a_full_disk_is_warned_of_once_and_stops_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curves_module, "draw_curves", full)
    hook, run = Curves(), made(tmp_path)
    with pytest.warns(LoopkitWarning, match="No space left"):
        hook.on_eval_end(run, {})
    hook.on_fit_end(run)


def test_a_missing_matplotlib_is_said_before_training(monkeypatch):
    monkeypatch.setattr(curves_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loopkit-torch\[plots\]'"):
        Curves().on_setup(made(None))


def test_pyplot_is_never_imported(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    code = (
        "import sys; from pathlib import Path; from loopkit.hooks.curves import draw_curves;"
        f"draw_curves([{{'step': 1, 'train/loss': 1.0}}], Path({str(tmp_path / 'c.png')!r}));"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""loopkit sweep: the values it tries, what it keeps, and how it continues."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from loopkit.cli.args.axes import take_axes
from loopkit.cli.sweep import trials
from loopkit.cli.sweep.space import Range, drawn, grid, read_space
from loopkit.errors import OptionError
from loopkit.monitor import Monitor


@pytest.fixture
def made(monkeypatch):
    """Train no model: note the commands, write the metric that a trial's lr gives, return a code."""
    commands: list[list[str]] = []
    codes: dict[int, int] = {}

    def run(command):
        commands.append(command)
        words = dict(word.partition("=")[::2] for word in command if word.startswith("--"))
        run_dir = Path(words["--run-dir"])
        run_dir.mkdir(parents=True, exist_ok=True)
        loss = abs(float(words["--lr"]) - 0.3)
        rows = [{"step": 1, "eval/loss": loss + 1}, {"step": 2, "eval/loss": loss}]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return codes.pop(len(commands), 0)

    monkeypatch.setattr(trials, "run_process", run)
    run.commands, run.codes = commands, codes
    return run


def test_a_grid_is_trained_and_the_best_is_named(loopkit, shapes, forks, tmp_path):
    out = loopkit.ok("sweep", shapes, "lr=1e-6,0.5", "--epochs", "1", "--progress", "false")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["trial", "lr", "eval/loss", "step", "status"]
    assert rows[1][:2] == ["2", "0.5"]
    assert rows[1][-2:] == ["finished", "*"]
    assert rows[2][:2] == ["1", "1e-6"]
    assert float(rows[1][2]) < float(rows[2][2])
    assert (tmp_path / "sweeps/points/002/checkpoints").is_dir()


def test_the_same_command_continues_and_another_is_refused(loopkit, shapes, made):
    words = ["sweep", shapes, "lr=0.1,0.2,0.3,0.4", "--epochs", "3"]
    made.codes |= {1: 1, 2: 130}  # the first fails, the second is interrupted
    code, out, err = loopkit(*words)
    assert code == 130
    assert "The same command continues the sweep" in err
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["*", "failed", "waiting", "waiting"]  # fmt: skip
    code, out, err = loopkit(*words)
    assert code == 0
    tried = [next(w for w in each if w.startswith("--lr")) for each in made.commands]
    assert tried == ["--lr=0.1", "--lr=0.2", "--lr=0.2", "--lr=0.3", "--lr=0.4"]
    assert "--resume=auto" in made.commands[2]
    assert "--epochs=3" in made.commands[2]
    assert out.splitlines()[1].split() == ["3", "0.3", "0.0000", "2", "finished", "*"]
    assert "--checkpoint sweeps/points/003" in err
    refused = loopkit.refused(*words[:-1], "4")
    assert "holds another sweep: its options is" in refused


def test_random_values_are_the_same_for_a_seed_and_a_longer_sweep_adds_to_them(
    loopkit, shapes, made
):
    space = ["lr=1e-4..1:log", "hidden=2..5", "--sweep-seed", "3"]
    loopkit.ok("sweep", shapes, *space, "--random", "3")
    found = json.loads(loopkit.ok("sweep", shapes, *space, "--random", "5", "--json"))
    assert len(made.commands) == len(found) == 5
    assert len({trial["values"]["lr"] for trial in found}) == 5
    assert all(1e-4 <= float(trial["values"]["lr"]) <= 1 for trial in found)
    assert all(trial["values"]["hidden"] in "2345" for trial in found)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "say after TARGET what to vary"),
        (["lr=0.1..1"], "a range has no end of values"),
        (["lr=1..0.1", "--random", "2"], "lr=1..0.1 is no range"),
        (["lr=0..1:log", "--random", "2"], "begins above 0"),
        (["lr=0.1,x"], "lr: 'x' is not accepted"),
        (["lrr=0.1,0.2"], "Did you mean '--lr'?"),
        (["lr=0.1", "--lr", "0.2"], "--lr is given, and the sweep gives it to each run"),
        (["lr=0.1", "--random", "0"], "--random 0: give a whole number of at least 1"),
        (["lr=0.1", "--random", "2", "--optuna", "2"], "not both"),
        (["lr=0.1", "--metric", "eval/loss"], "as 'eval/loss:min'"),
        (["lr=0.1", "--run-dir", "r"], "no option --run_dir"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_the_first_run(loopkit, shapes, made, words, says):
    assert says in loopkit.refused("sweep", shapes, *words)
    assert made.commands == []


def test_values_of_a_space():
    axes = take_axes(["t.py", "a=1,2", "b=none"], "sweep")
    assert list(grid(read_space(axes))) == [{"a": "1", "b": "null"}, {"a": "2", "b": "null"}]
    space = read_space({"n": ["1..1000:log"], "x": ["-1..1.5"], "k": ["2..4"]})
    assert space["n"] == Range(1, 1000, log=True, whole=True)
    values = list(drawn(space, 200, seed=0))
    assert {value["k"] for value in values} == {"2", "3", "4"}
    below = sum(int(value["n"]) <= 31 for value in values)
    assert 70 < below < 130  # half of the orders of magnitude
    with pytest.raises(OptionError, match="is no range"):
        read_space({"n": ["a..b"]})


def test_ctrl_c_is_passed_on_to_a_trial_that_the_terminal_does_not_reach():
    program = (
        "import os, signal, sys\nassert os.getsid(0) == os.getpid()\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(101))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "while True: signal.pause()\n"
    )
    before = signal.getsignal(signal.SIGINT)
    assert trials.run_process([sys.executable, "-c", program]) == 101
    assert signal.getsignal(signal.SIGINT) is before


def test_optuna_chooses_prunes_and_continues(loopkit, shapes, forks, tmp_path):
    optuna = pytest.importorskip("optuna", reason="needs pip install 'loopkit-torch[optuna]'")
    words = ["sweep", shapes, "lr=1e-6..1:log", "--epochs", "2", "--progress", "false"]
    loopkit.ok(*words, "--optuna", "2")
    found = json.loads(loopkit.ok(*words, "--optuna", "8", "--json"))
    assert [trial["optuna"] for trial in found] == list(range(8))
    assert {trial["status"] for trial in found} <= {"finished", "pruned"}
    from loopkit.hooks.optuna_prune import STUDY, journal

    study = optuna.load_study(
        study_name=STUDY, storage=journal(tmp_path / "sweeps/points/optuna.log")
    )
    best = min(found, key=lambda trial: trial["best"])
    assert study.best_trial.number == best["optuna"]


def test_the_hook_reports_and_stops_a_run_that_optuna_gives_up():
    pytest.importorskip("optuna", reason="needs pip install 'loopkit-torch[optuna]'")
    from loopkit.hooks import OptunaPrune
    from tests.support import Tiny, quiet

    class Trial:
        def __init__(self):
            self.reported, self.attributes = [], {}

        def report(self, value, step):
            self.reported.append(step)

        def should_prune(self):
            return len(self.reported) == 2

        def set_user_attr(self, name, value):
            self.attributes[name] = value

    trial = Trial()
    hook = OptunaPrune(trial, "eval/loss:min")
    result = quiet(epochs=5, hooks=[hook]).run(Tiny())
    assert (result.status, result.epoch, hook.pruned) == ("stopped", 2, True)
    assert trial.reported == [2, 4]
    assert trial.attributes == {"pruned": True}


def test_a_sweep_of_a_metric_that_grows(tmp_path):
    sweep = trials.Sweep(tmp_path, {}, Monitor("f1", "max"))
    sweep.trials = [
        trials.Trial(n, {"lr": str(n)}, "finished", f1, 1) for n, f1 in ((1, 0.2), (2, 0.9))
    ]
    assert sweep.best() is sweep.trials[1]
    assert sweep.table()[1].split() == ["2", "2", "0.9000", "1", "finished", "*"]

"""init, resume, lr-find, completion, and what help and errors say to somebody new."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from loopkit.checkpoint.tools import list_checkpoints
from loopkit.cli.args.help import GROUPS, TYPED
from loopkit.options import Options


@pytest.fixture(autouse=True)
def _forget_moons():
    yield
    for name in ("moons", "broken", "imports_broken"):
        sys.modules.pop(name, None)


def test_init_writes_a_file_that_trains_and_leaves_one_that_is_there(loopkit, tmp_path):
    assert "loopkit fit moons.py --epochs 20" in loopkit.ok("init")
    out = loopkit.ok("fit", "moons.py", "--steps", "3", "--batch-size", "8", "--limit-eval", "1")
    assert "loopkit evaluate moons.py --checkpoint runs/moons/1" in out
    text = (tmp_path / "moons.py").read_text()
    assert "loopkit fit moons.py" in text
    assert 'if __name__ == "__main__":' in text
    code, _, err = loopkit("init", "moons.py")
    assert (code, err) == (73, "loopkit: moons.py is there already, and is left as it is: give another name\n")  # fmt: skip
    assert "no name for a Python module" in loopkit.refused("init", "my-task.py")


def test_resume_continues_with_the_options_of_the_run_and_those_that_are_typed(
    loopkit, shapes, tmp_path
):
    loopkit.ok("fit", shapes, "--hidden", "5", "--epochs", "1", "--run-dir", "runs/a")
    out = loopkit.ok("resume", "runs/a", "--epochs", "2")
    assert "steps" in out
    assert list_checkpoints(tmp_path / "runs/a")[-1].step == 4
    command = json.loads((tmp_path / "runs/a/command.json").read_text())
    assert "--hidden=5" in command["options"]
    loopkit.ok("fit", shapes, "--hidden", "5", "--epochs", "2", "--run-dir", "runs/b")
    _, out, _ = loopkit("ckpt", "diff", "runs/a", "runs/b")
    assert out.splitlines()[0].startswith("A is runs/a/checkpoints/step-")
    assert "tensors that differ" not in out


def test_resume_says_what_it_needs(loopkit, shapes, tmp_path):
    code, _, err = loopkit("resume", "nowhere")
    assert code == 73
    assert "there is no run directory nowhere" in err
    (tmp_path / "by_program").mkdir()
    assert "run its program again" in loopkit("resume", "by_program")[2]
    loopkit.ok("fit", shapes, "--run-dir", "runs/1")
    loopkit.ok("fit", shapes, "--run-dir", "runs/2")
    for words in (
        ["resume", "runs"],
        ["ckpt", "ls", "runs"],
        ["ckpt", "export", "runs", "out"],
        ["evaluate", shapes, "--checkpoint", "runs"],
    ):
        code, _, err = loopkit(*words)
        assert code != 0
        assert "runs is no run, and holds 2: name one of runs/1, runs/2" in err


def test_lr_find_prints_a_rate_and_leaves_nothing(loopkit, shapes, tmp_path):
    out = loopkit.ok("lr-find", shapes, "--low", "1e-3", "--high", "10", "--points", "30")
    assert 1e-3 < float(out) < 10
    assert list(tmp_path.iterdir()) == []
    loopkit.ok("lr-find", shapes, "--points", "20", "--low", "1e-3", "--run-dir", "kept")
    assert (tmp_path / "kept/find_lr.csv").read_text().startswith("rate,loss")
    assert "low: 'x' is not accepted" in loopkit.refused("lr-find", shapes, "--low", "x")


def test_every_option_is_in_one_group_of_the_help():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(field.name for field in fields(Options))
    assert set(TYPED) <= set(grouped)


@pytest.mark.parametrize("columns", [60, 200])
def test_help_is_as_wide_as_the_terminal_and_has_groups_and_examples(
    loopkit, shapes, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = loopkit.ok("fit", shapes, "--help")
    longest = max(len(line) for line in out.splitlines() if shapes not in line)
    assert columns - 25 < longest <= columns
    assert f"loopkit fit {shapes} --run-dir runs/first --resume auto" in out
    assert "\n\nSave and resume\n  --run-dir" in out
    assert "--hooks+=EarlyStop, and its arguments with --hooks.patience 3" in " ".join(out.split())


def test_a_file_with_a_syntax_error_shows_the_line_and_a_caret(loopkit, tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n    pass\n")
    (tmp_path / "imports_broken.py").write_text("import broken\n")
    for file in ("broken.py", "imports_broken.py"):
        code, _, err = loopkit("fit", file)
        assert code == 1
        lines = err.splitlines()
        assert lines[0] == f'  File "{tmp_path}/broken.py", line 2'
        assert lines[1].strip() == "def f(:"
        assert lines[2].strip() == "^"
        assert lines[-1] == f"loopkit: {tmp_path}/broken.py is not valid Python"
        assert len(lines) == 5


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("loopkit swe", ["sweep"]),
        ("loopkit fit task.py --checkpoint.ke", ["--checkpoint.keep", "--checkpoint.keep-best"]),
        ("loopkit ckpt v", ["verify"]),
        ("loopkit report --epo", []),
    ],
)
def test_bash_completes_commands_and_options(loopkit, typed, offered):
    script = loopkit.ok("completion", "bash")
    words = typed.split()
    program = (
        f"{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _loopkit\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered


def test_zsh_and_fish_have_a_script_and_other_shells_are_refused(loopkit):
    assert loopkit.ok("completion", "zsh").startswith("autoload")
    script = loopkit.ok("completion", "fish")
    assert "-l clip-norm" in script
    if shutil.which("fish"):
        words = ["fish", "-c", f"{script}\ncomplete -C 'loopkit fit digits.py --clip-n'"]
        ran = subprocess.run(words, capture_output=True, text=True)
        assert ran.stdout == "--clip-norm\n", ran.stderr
    assert "'bash', 'zsh', 'fish'" in loopkit.refused("completion", "csh")

"""``loopkit bench``: real trainings in processes of their own, whose time and memory are known
beforehand.
"""

import json
import subprocess
import sys

import pytest

from loopkit.cli.bench import plot
from loopkit.cli.bench.bench import run_worker
from loopkit.errors import MissingExtraError


@pytest.fixture
def heavy(shapes):
    return shapes.replace("shapes", "heavy")


def measured(path):
    """The rows of a JSON file by what they were made with."""
    found = json.loads(path.read_text())
    return {tuple(row["with"].values()): row for row in found["rows"]}, found


def cells(out):
    """The table's lines by their first word."""
    return {line.split()[0]: line.split() for line in out.splitlines() if line}


def test_precision_trains_in_each_and_tells_time_memory_and_loss(loopkit, shapes, tmp_path, forks):
    code, out, err = loopkit(
        "bench",
        "precision",
        shapes,
        "--steps",
        "4",
        "--batch-size",
        "16",
        "--json",
        "p.json",
        "--picture",
        "p.png",
    )
    assert code == 0, err
    rows, about = measured(tmp_path / "p.json")
    assert (about["bench"], about["task"], about["steps"]) == ("precision", "Points", 4)
    assert list(rows) == [("fp32",), ("bf16",), ("fp16",), ("bf16-true",), ("fp16-true",)]
    assert all(row["problem"] is None and row["device"] == "cpu" for row in rows.values())
    assert [row["parameter_bytes"] for row in rows.values()] == [232, 232, 232, 116, 116]
    for (name,), row in rows.items():
        assert row["samples_per_second"] * row["step_ms"] / 1e3 == pytest.approx(16)
        assert cells(out)[name][1] == f"{row['step_ms']:,.2f}"
    assert rows["fp32",]["loss"] == pytest.approx(rows["bf16",]["loss"], abs=0.02)
    assert "fp16; fp16-true: float16 is very slow on a CPU" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert err.count("loopkit: precision=") == 5


def test_memory_is_counted_byte_by_byte(loopkit, shapes, tmp_path, forks):
    out = loopkit.ok(
        "bench", "memory", shapes, "--steps", "1", "--json", "m.json", "--picture", "m.svg"
    )
    rows, _ = measured(tmp_path / "m.json")
    parts = {
        name: [row[f"{part}_bytes"] for part in ("parameter", "gradient", "optimizer")]
        for (name,), row in rows.items()
    }
    assert parts == {
        "fp32": [232] * 3,
        "bf16": [232] * 3,
        "bf16-true": [116] * 3,
    }  # 58 parameters, SGD with momentum
    lines = [line.split() for line in out.splitlines()]
    assert ["58", "parameters,", "58", "of", "them", "trained"] in lines
    assert lines[3:7] == [
        ["fp32", "232", "B"],
        ["bf16", "116", "B"],
        ["int8", "58", "B"],
        ["4-bit", "29", "B"],
    ]
    assert ["fp32", "232", "B", "232", "B", "232", "B", "696", "B"] in [line[:9] for line in lines]
    assert "<svg" in (tmp_path / "m.svg").read_text()


def test_the_peak_is_what_training_takes_beyond_the_task(loopkit, heavy, tmp_path, forks):
    loopkit.ok(
        "bench",
        "grid",
        f"{heavy}:Heavy",
        "adam=true,false",
        "--steps",
        "2",
        "--json",
        "g.json",
        "--width",
        "2048",
    )
    rows, _ = measured(tmp_path / "g.json")
    size = rows["true",]["parameter_bytes"]
    assert size == 4 * (2048 * 2048 + 2048) * 4
    # Gradients and, with Adam, two averages of them: that is all but a few activations.
    assert rows["true",]["peak_bytes"] == pytest.approx(3 * size, rel=0.15)
    assert rows["false",]["peak_bytes"] == pytest.approx(size, rel=0.45)
    assert rows["false",]["optimizer_bytes"] == 0


def test_a_grid_has_a_line_for_every_combination_and_shows_what_activation_checkpointing_saves(
    loopkit, heavy, tmp_path, forks
):
    words = [
        "--steps",
        "2",
        "--width",
        "256",
        "--depth",
        "8",
        "--rows",
        "2048",
        "--batch-size",
        "1024",
    ]
    out = loopkit.ok(
        "bench",
        "grid",
        f"{heavy}:Heavy",
        "activation_checkpointing=none,full",
        "accumulate=1,2",
        *words,
        "--json",
        "g.json",
    )
    rows, _ = measured(tmp_path / "g.json")
    assert list(rows) == [("none", "1"), ("none", "2"), ("full", "1"), ("full", "2")]
    for (activation_checkpointing, accumulate), row in rows.items():
        assert row["samples_per_second"] * row["step_ms"] / 1e3 == pytest.approx(
            1024 * int(accumulate)
        )
        line = [
            activation_checkpointing,
            accumulate,
            f"{row['step_ms']:,.2f}",
            f"{row['samples_per_second']:,.0f}",
        ]
        assert line in [text.split()[:4] for text in out.splitlines()]
    # Each of eight blocks keeps nine tensors of 1024 x 256 floats, or with activation_checkpointing only its input.
    assert rows["full", "1"]["peak_bytes"] < 0.7 * rows["none", "1"]["peak_bytes"]


def test_a_step_is_timed_whole(loopkit, shapes, tmp_path, forks):
    loopkit.ok("bench", "grid", shapes, "pause=0.0,0.05", "--steps", "3", "--json", "t.json")
    rows, _ = measured(tmp_path / "t.json")
    assert rows["0.0",]["step_ms"] < 50 <= rows["0.05",]["step_ms"]


def test_what_cannot_run_is_a_line_with_the_reason(loopkit, heavy, tmp_path, forks):
    code, out, _ = loopkit(
        "bench", "grid", f"{heavy}:Failing", "how=raise,kill,exit,stop", "--json", "f.json"
    )
    assert code == 1
    assert "no run completed" in out
    lines = out.splitlines()
    assert ["raise", "-", "-", "-", "-"] in [line.split() for line in lines]
    assert "raise: ValueError: no such way" in lines
    assert "kill: the process ended by SIGKILL: out of memory?" in lines
    assert any(line.startswith("exit: the process ended with code 3") for line in lines)
    assert "stop: the run stopped after 2 steps, and the first 3 do not count" in lines
    rows, _ = measured(tmp_path / "f.json")
    assert rows["raise",]["problem"] == "ValueError: no such way"


def test_one_failure_leaves_the_others(loopkit, heavy, forks):
    out = loopkit.ok("bench", "grid", f"{heavy}:Failing", "how=well,raise", "--steps", "1")
    assert cells(out)["well"][1] != "-"
    assert cells(out)["raise"][1] == "-"


def test_a_run_that_takes_too_long_is_given_up(heavy, forks):
    assert run_worker([f"{heavy}:Failing", "--how=hang"], 1, 0.5) == {
        "problem": "stopped after 0.5 s (--limit)"
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("memry shapes.py", "there is no command 'bench memry'. Did you mean 'memory'?"),
        ("precision", "give the target first: loopkit bench precision TARGET"),
        ("grid shapes.py", "say after TARGET what to vary, as in accumulate=2,4,8"),
        ("grid shapes.py accumulate", "'accumulate' is no name=a,b"),
        (
            "grid shapes.py activation_checkpointing=full activation_checkpointing=none",
            "activation_checkpointing is given twice",
        ),
        (
            "grid shapes.py acumulate=2",
            "there is no option --acumulate. Did you mean '--accumulate'?",
        ),
        (
            "grid shapes.py accumulate=1,two",
            "accumulate: 'two' is not accepted: give a whole number",
        ),
        (
            "grid shapes.py activation_checkpointing=none,some",
            "activation_checkpointing='some' is not known: give 'full'",
        ),
        ("grid shapes.py epochs=1,2", "bench grid: epochs is not for a measured run"),
        (
            "memory shapes.py --checkpoint.every 1",
            "bench memory: checkpoint.every is not for a measured run",
        ),
        (
            "precision shapes.py --precision bf16",
            "--precision is given, and bench precision gives it to each run",
        ),
        ("precision shapes.py --steps none", "--steps none: give a whole number above 0"),
        ("precision shapes.py --limit 0", "--limit 0: give a number of seconds above 0"),
        ("precision shapes.py --json a --json b", "--json is given several times"),
        (
            "precision shapes.py --picture a.xyz",
            "--picture a.xyz: the ending says the format, one of",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(loopkit, shapes, words, says):
    assert says in loopkit.refused(
        "bench", *[shapes if word == "shapes.py" else word for word in words.split()]
    )


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(loopkit, shapes):
    assert loopkit("bench", "memory", shapes, "--json", "no/m.json") == (
        73,
        "",
        "loopkit: --json no/m.json cannot be written: there is no directory no\n",
    )


def test_an_argument_that_the_task_needs_may_be_what_is_varied(loopkit, shapes):
    out = loopkit.ok(
        "bench", "grid", f"{shapes.replace('shapes', 'several')}:Wide", "width=2", "--steps", "1"
    )
    assert cells(out)["2"][1] != "-"


def test_matplotlib_is_imported_for_a_picture_alone(monkeypatch, tmp_path):
    code = "import sys, loopkit.cli.bench.bench; print('matplotlib' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "False\n"
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        MissingExtraError,
        match=r"--picture needs the package 'matplotlib': pip install 'loopkit-torch\[plots\]'",
    ):
        plot.check(tmp_path / "p.png")

"""``loopkit evaluate`` and ``predict``: what they load, and what they write."""

import errno
import json
import math

import numpy as np
import pytest
import torch

from loopkit.checkpoint.tools import list_checkpoints


@pytest.fixture
def trained(loopkit, shapes, tmp_path):
    loopkit.ok("fit", shapes, "--run_dir", "r", "--hidden", "5", "--epochs", "4")
    return tmp_path / "r"


def test_metrics_are_those_of_the_checkpoint_with_the_arguments_it_was_trained_with(
    loopkit, shapes, trained
):
    recorded = list_checkpoints(trained)[-1].metrics["eval/loss"]
    code, out, err = loopkit("evaluate", shapes, "--checkpoint", trained, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["eval/loss"] == recorded
    one = list_checkpoints(trained)[0]
    out = loopkit.ok("evaluate", shapes, "--checkpoint", one.path, "--json")
    assert json.loads(out)["eval/loss"] == one.metrics["eval/loss"] != recorded


def test_a_test_measures_the_test_data(loopkit, shapes, trained):
    code, out, err = loopkit("test", shapes, "--checkpoint", trained, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert sorted(found) == ["test/loss", "test/runtime", "test/samples_per_second"]
    evaluated = json.loads(loopkit.ok("evaluate", shapes, "--checkpoint", trained, "--json"))
    assert found["test/loss"] != evaluated["eval/loss"]
    lines = loopkit.ok("test", shapes, "--checkpoint", trained).splitlines()
    assert lines[0].startswith("test/loss ")


def test_a_task_without_test_data_says_so(loopkit, tmp_path):
    target = tmp_path / "own.py"
    target.write_text(
        "from shapes import Points\nclass Own(Points):\n    def test_data(self): pass\n"
    )
    code, out, err = loopkit("test", f"{target}:Own")
    assert (code, out) == (1, "")
    assert "Own.test_data() returned nothing" in err


def test_a_file_of_objects_by_sample_has_a_line_for_each(loopkit, tmp_path):
    target = tmp_path / "boxes.py"
    target.write_text(
        "import dataclasses, torch\nfrom shapes import Points\n"
        "class Boxes(Points):\n"
        "    def predict_step(self, batch):\n"
        "        return tuple({'boxes': torch.ones(i % 3, 4)} for i in range(len(batch[0])))\n"
        "@dataclasses.dataclass\nclass Out:\n    a: object\n    b: object = None\n"
        "class Parts(Points):\n"
        "    def predict_step(self, batch):\n"
        "        return Out(self.net(batch[0]).argmax(1))\n"
        "class Uneven(Points):\n"
        "    def predict_step(self, batch):\n"
        "        return {'a': batch[0], 'b': batch[1][1:]}\n"
    )
    lines = loopkit.ok("predict", f"{target}:Boxes", "--eval-batch-size", "5").splitlines()
    assert [len(json.loads(line)["boxes"]) for line in lines[:6]] == [0, 1, 2, 0, 1, 0]
    assert len(lines) == 64
    lines = loopkit.ok("predict", f"{target}:Parts", "--eval-batch-size", "5").splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"a", "b"}] * 64
    code, _, err = loopkit("predict", f"{target}:Uneven")
    assert code == 1
    assert "parts of 31, 32 entries for one batch" in err


def test_metrics_are_aligned(loopkit, shapes, trained):
    lines = loopkit.ok("evaluate", shapes, "--checkpoint", trained).splitlines()
    assert [line.split()[0] for line in lines] == [
        "eval/loss",
        "eval/runtime",
        "eval/samples_per_second",
    ]
    assert len({len(line) for line in lines}) == 1


def test_without_a_checkpoint_it_is_said_that_the_weights_are_untrained(loopkit, shapes):
    code, out, err = loopkit("evaluate", shapes, "--json")
    assert code == 0
    assert "no --checkpoint" in err
    assert 0.4 < json.loads(out)["eval/loss"] < 1.2


def test_a_typed_argument_goes_before_the_recorded_one(loopkit, shapes, trained):
    code, _, err = loopkit("evaluate", shapes, "--checkpoint", trained, "--hidden", "6")
    assert code == 1
    assert "does not fit the task" in err


def test_an_argument_that_training_was_given_is_not_asked_for_again(loopkit, shapes, tmp_path):
    target = f"{shapes.replace('shapes', 'several')}:Wide"
    loopkit.ok("fit", target, "--width", "6", "--run_dir", "w")
    assert "eval/loss" in loopkit.ok("evaluate", target, "--checkpoint", "w")


def test_the_config_of_a_fit_serves_an_evaluation(loopkit, shapes, trained, tmp_path):
    text = loopkit.ok("fit", shapes, "--hidden", "5", "--checkpoint.keep", "1", "--print-config")
    tmp_path.joinpath("run.yaml").write_text(text)
    assert "eval/loss" in loopkit.ok(
        "evaluate", shapes, "--config", "run.yaml", "--checkpoint", trained
    )


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--checkpoint", "nowhere"], 1, "--checkpoint nowhere: there is no such checkpoint"),
        (["--checkpoint", "a", "--checkpoint", "b"], 2, "given several times"),
        (["--checkpoint"], 2, "--checkpoint needs a value"),
        (["--jsn"], 2, "Did you mean '--json'?"),
        (["--json", "yes"], 2, "--json takes no value, and got 'yes'"),
    ],
)
def test_what_cannot_be_evaluated(loopkit, shapes, words, code, says):
    found, out, err = loopkit("evaluate", shapes, *words)
    assert (found, out) == (code, "")
    assert says in err


def test_a_run_without_a_valid_checkpoint_is_65(loopkit, shapes, trained):
    for file in trained.rglob("model.safetensors"):
        file.write_bytes(b"")
    code, _, err = loopkit("predict", shapes, "--checkpoint", trained)
    assert code == 65, err


def test_infinities_are_strings_in_json():
    from loopkit.cli.evaluate import to_json

    found = to_json({"a": math.nan, "b": [1.5, math.inf], "c": {"d": -math.inf}})
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "a": "nan",
        "b": [1.5, "inf"],
        "c": {"d": "-inf"},
    }


def test_predictions_are_json_lines_on_stdout_in_order(loopkit, shapes, trained):
    out = loopkit.ok(
        "predict", shapes, "--checkpoint", trained, "--form", "named", "--eval_batch_size", "7"
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 64
    assert all(row["class"] == int(row["logits"][1] > row["logits"][0]) for row in rows)
    again = loopkit.ok("predict", shapes, "--checkpoint", trained)
    assert [json.loads(line) for line in again.splitlines()] == [row["class"] for row in rows]


def test_predictions_in_files(loopkit, shapes, trained, tmp_path):
    def predict(form, out):
        code, printed, err = loopkit(
            "predict", shapes, "--checkpoint", trained, "--form", form, "--out", out
        )
        assert (code, printed, err) == (0, "", f"loopkit: 64 predictions in {out}\n")
        return tmp_path / out

    logits = np.load(predict("logits", "l.npy"))
    assert (logits.shape, logits.dtype) == ((64, 2), np.float32)
    classes = np.load(predict("class", "c.npy"))
    assert (classes == logits.argmax(-1)).all()
    named = np.load(predict("named", "n.npz"))
    assert (named["logits"] == logits).all()
    assert (named["class"] == classes).all()
    lines = predict("named", "n.jsonl").read_text().splitlines()
    assert np.allclose([json.loads(line)["logits"] for line in lines], logits)
    assert predict("class", "c.txt").read_text() == "".join(f"{value}\n" for value in classes)
    assert [len(line.split()) for line in predict("logits", "l.txt").read_text().splitlines()] == [
        2
    ] * 64
    words = predict("words", "w.txt").read_text().splitlines()
    assert words == [["be\\nlow", "above"][value] for value in classes]
    assert np.load(predict("words", "w.npy")).tolist() == [
        ["be\nlow", "above"][value] for value in classes
    ]
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("form", "out", "code", "says"),
    [
        ("class", "p.json", 2, "the ending says the format"),
        ("named", "p.npy", 2, "write an .npz or .jsonl file"),
        ("class", "p.npz", 2, "write an .npy or .jsonl file"),
        ("named", "p.txt", 2, "write a .jsonl file"),
        ("class", "no/p.txt", 73, "no/p.txt cannot be written: No such file"),
    ],
)
def test_a_file_that_cannot_be_written_is_not_there(
    loopkit, shapes, tmp_path, form, out, code, says
):
    found, _, err = loopkit("predict", shapes, "--form", form, "--out", out)
    assert (found, says in err) == (code, True), err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_74_and_leaves_the_old_file(tmp_path):
    from loopkit.cli.predict import open_sink
    from loopkit.errors import DiskFullError

    out = tmp_path / "p.jsonl"
    out.write_text("old")
    with pytest.raises(DiskFullError, match="no room for") as caught, open_sink(out):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 74
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    ("outputs", "rows"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, float("inf")]]), [[1.0, 2.0], [3.0, float("inf")]]),
        (torch.tensor([1.5, 2.5], dtype=torch.bfloat16), [1.5, 2.5]),
        ({"a": torch.tensor([1, 2]), "b": ["x", "y"]}, [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
        ((torch.tensor([1, 2]), torch.tensor([3, 4])), [[1, 3], [2, 4]]),
        ([{"n": np.float32(0.5)}, {"n": torch.tensor(2)}], [{"n": 0.5}, {"n": 2}]),
        ([], []),
    ],
)
def test_samples_of_a_batch(outputs, rows):
    from loopkit.cli.predict import samples

    assert list(samples(outputs)) == rows


@pytest.mark.parametrize("outputs", [torch.tensor(1.0), 3, "word", None])
def test_what_has_no_samples_is_refused(outputs, tmp_path):
    from loopkit.cli.predict import open_sink
    from loopkit.errors import TaskError

    for name in ("p.jsonl", "p.npy"):
        with (
            pytest.raises(TaskError, match="predict_step returned"),
            open_sink(tmp_path / name) as sink,
        ):
            sink.write(outputs)


def test_predictions_of_different_shapes_make_no_array(tmp_path):
    from loopkit.cli.predict import open_sink
    from loopkit.errors import TaskError

    with (
        pytest.raises(TaskError, match="make no array: write a"),
        open_sink(tmp_path / "p.npy") as sink,
    ):
        sink.write([[1, 2], [3]])

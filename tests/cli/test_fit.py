"""``loopkit fit``: options, their types, configs, and what a run leaves behind."""

import json
import re

import pytest
import torch
import yaml

from loopkit.checkpoint import load_snapshot
from loopkit.checkpoint.tools import list_checkpoints


def state(run_dir):
    return load_snapshot(run_dir)


def options(run_dir):
    return json.loads((run_dir / "hparams.json").read_text())["options"]


def test_a_run_with_no_option_trains_one_epoch(loopkit, shapes, tmp_path):
    loopkit.ok("fit", shapes)
    assert state(tmp_path / "runs/points/1").meta["step"] == 2


def test_options_of_fit_and_arguments_of_the_task(loopkit, shapes, tmp_path):
    loopkit.ok(
        "fit",
        shapes,
        "--epochs=3",
        "--batch-size",
        "16",
        "--hidden",
        "5",
        "--task.lr",
        "1e-3",
        "--bias",
        "false",
        "--names",
        "[a, b]",
        "--run_dir",
        "here",
        "--clip_norm",
        "1",
    )
    found = state(tmp_path / "here")
    assert found.meta["step"] == 12
    assert found.state["task"]["hparams"] == {
        "hidden": 5,
        "lr": 0.001,
        "seed": 3,
        "names": ["a", "b"],
        "bias": False,
        "pause": 0.0,
        "momentum": 0.9,
        "form": "class",
    }
    assert options(tmp_path / "here")["clip_norm"] == 1.0


def test_of_a_name_that_both_have_the_bare_form_is_fits(loopkit, shapes, tmp_path):
    loopkit.ok("fit", shapes, "--seed", "7", "--task.seed", "11")
    found = state(tmp_path / "runs/points/1")
    assert found.state["seed"]["seed"] == 7
    assert found.state["task"]["hparams"]["seed"] == 11


def test_a_default_that_was_not_given_stays_the_codes(loopkit, shapes, tmp_path):
    loopkit.ok("fit", f"{shapes.replace('shapes', 'several')}:Wide", "--width", "6", "--lr", "0.5")
    assert state(tmp_path / "runs/wide/1").state["task"]["hparams"] == {"width": 6, "lr": 0.5}


def test_a_required_argument_is_asked_for(loopkit, shapes):
    assert (
        loopkit.refused("fit", f"{shapes.replace('shapes', 'several')}:Wide")
        == "Wide needs --width (any)"
    )


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--log_every 5", "log_every", 5),
        ("--log_every=5 steps", "log_every", "5 steps"),
        ("--epochs 0.5", "epochs", 0.5),
        ("--time 30", "time", 30),
        ("--time=2 min", "time", "2 min"),
        ("--eval_first", "eval_first", True),
        ("--eval_after 5", "eval_after", 5),
        ("--eval_after=50%", "eval_after", "50%"),
        ("--progress false", "progress", False),
        ("--checkpoint false", "checkpoint", False),
        ("--resume auto", "resume", "auto"),
        ("--limit_train 0.5", "limit_train", 0.5),
        ("--devices 1", "devices", 1),
        ("--devices auto", "devices", "auto"),
        ("--loggers+=csv", "loggers", ["jsonl", "tensorboard", "csv"]),
        ("--loggers jsonl", "loggers", "jsonl"),
    ],
)
def test_values_have_the_type_of_the_option(loopkit, shapes, tmp_path, words, name, value):
    name_word, _, rest = (
        words.replace("=", " ", 1).partition(" ") if "+=" not in words else (words, "", "")
    )
    loopkit.ok(
        "fit", shapes, "--run_dir", "r", "--steps", "1", name_word, *([rest] if rest else [])
    )
    found = options(tmp_path / "r")[name]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("every", ["1", "1 steps", "50%"])
def test_settings_of_checkpoints(loopkit, shapes, tmp_path, every):
    loopkit.ok(
        "fit", shapes, "--checkpoint.every", every, "--checkpoint.keep", "2", "--epochs", "2"
    )
    steps = {"50%": [2, 4]}.get(every, [3, 4])
    assert [entry.step for entry in list_checkpoints(tmp_path / "runs/points/1")] == steps


def test_hooks_by_class_path_and_by_short_name_in_order(loopkit, shapes):
    out = loopkit.ok(
        "fit",
        shapes,
        "--hooks+=shapes.Shout",
        "--hooks.word=one",
        "--hooks+=Shout",
        "--hooks.times=2",
    )
    assert out.startswith("one\nhey hey\n")


def test_a_loop_of_ones_own(loopkit, shapes):
    assert loopkit.ok("fit", shapes, "--step", "LoudStep").startswith("step 1\nstep 2\n")


def test_a_strategy_with_arguments(loopkit, shapes, tmp_path):
    loopkit.ok("fit", shapes, "--strategy", "SingleDevice", "--strategy.device", "cpu")
    assert state(tmp_path / "runs/points/1").meta["strategy"] == "SingleDevice"


@pytest.mark.parametrize(
    "words",
    [
        ("--strategy", "TensorParallel({'net.0': 'colwise'}, size=2)"),
        (
            "--strategy",
            "TensorParallel",
            "--strategy.plan",
            "{net.0: colwise}",
            "--strategy.size",
            "2",
        ),
        (
            "--strategy",
            "loopkit.TensorParallel",
            "--strategy.plan",
            "{net.0: colwise}",
            "--strategy.size=2",
        ),
    ],
)
def test_a_strategy_that_splits_layers_is_typed_like_any_other(loopkit, shapes, words):
    printed = loopkit.ok("fit", shapes, "--print-config", *words)
    assert "TensorParallel" in printed
    assert "colwise" in printed


def test_a_config_reads_the_same_names_and_the_command_line_goes_before_it(
    loopkit, shapes, tmp_path
):
    tmp_path.joinpath("run.yaml").write_text(
        "epochs: 2\nclip-norm: 1e-3\nbatch_size: 16\nhidden: 4\ntask: {lr: 5e-2, seed: 9}\n"
        "checkpoint: {every: 2 steps, keep: 5}\nhooks: [{class_path: Shout, init_args: {word: "
        "yaml}}]\n"
    )
    out = loopkit.ok(
        "fit",
        shapes,
        "--epochs",
        "1",
        "--checkpoint.keep",
        "1",
        "--hooks+=Shout",
        "--config",
        "run.yaml",
    )
    assert out.startswith("yaml\nhey\n")
    found = state(tmp_path / "runs/points/1")
    assert found.meta["step"] == 4
    hparams = found.state["task"]["hparams"]
    assert (hparams["hidden"], hparams["lr"], hparams["seed"]) == (4, 0.05, 9)
    assert options(tmp_path / "runs/points/1")["clip_norm"] == 0.001
    assert len(list_checkpoints(tmp_path / "runs/points/1")) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epohcs: 3", "run.yaml: there is no option epohcs. Did you mean 'epochs'?"),
        (
            "num_train_epochs: 3",
            "run.yaml: there is no option num_train_epochs. Here that is epochs",
        ),
        (
            "task: {hiden: 3}",
            "run.yaml: there is no option task.hiden. Did you mean 'task.hidden'?",
        ),
        ("task: 3", "run.yaml: task: 3 is not a mapping"),
        (
            "checkpoint: {evry: 3}",
            "run.yaml: there is no option checkpoint.evry. Did you mean 'checkpoint.every'?",
        ),
        (
            "hooks: [{class_path: Shout, init_args: {wrd: x}}]",
            "Shout has no option 'wrd'. Did you mean 'word'?",
        ),
        ("epochs: many", "epochs: 'many' is not accepted: give a number or null."),
        ("task: {hidden: wide}", "task.hidden: 'wide' is not accepted: give a whole number."),
        ("just words", "holds no options"),
        ("a: [", "run.yaml is not YAML"),
    ],
)
def test_what_is_wrong_in_a_config_is_named(loopkit, shapes, tmp_path, text, says):
    tmp_path.joinpath("run.yaml").write_text(text)
    assert says in loopkit.refused("fit", shapes, "--config", "run.yaml")


def test_a_config_that_is_not_there(loopkit, shapes):
    assert "--config no.yaml cannot be read" in loopkit.refused(
        "fit", shapes, "--config", "no.yaml"
    )


def test_a_printed_config_gives_the_same_run(loopkit, shapes, tmp_path):
    words = [
        "--epochs",
        "2",
        "--hidden",
        "6",
        "--task.seed",
        "5",
        "--checkpoint.every",
        "3 steps",
        "--clip_norm",
        "0.5",
        "--hooks+=Shout",
        "--hooks.word=again",
        "--loggers",
        "jsonl",
        "--eval_every",
        "never",
    ]
    text = loopkit.ok("fit", shapes, *words, "--print-config")
    assert not (tmp_path / "runs").exists()
    tmp_path.joinpath("run.yaml").write_text(text)
    assert loopkit.ok("fit", shapes, "--config", "run.yaml", "--print-config") == text
    written = yaml.safe_load(text)
    assert written["task"]["hidden"] == 6
    assert written["checkpoint"]["every"] == "3 steps"
    assert written["seed"] == 0
    loopkit.ok("fit", shapes, *words, "--run_dir", "typed")
    loopkit.ok("fit", shapes, "--config", "run.yaml", "--run_dir", "read")
    typed, read = state(tmp_path / "typed"), state(tmp_path / "read")
    assert typed.state["task"] == read.state["task"]
    assert all(
        torch.equal(read.tensors["model"][name], tensor)
        for name, tensor in typed.tensors["model"].items()
    )


def test_help_shows_every_option_with_type_default_and_meaning(loopkit, shapes):
    from dataclasses import fields

    from loopkit.options import Options

    out = loopkit.ok("fit", shapes, "--help")
    names = [f.name.replace("_", "-") for f in fields(Options)]
    assert all(re.search(rf"^  --{name}( |$)", out, re.MULTILINE) for name in names)
    assert "  --hidden                width of the hidden layer. [int, default 8]\n" in out
    assert "  --task.seed             of the weights. [int, default 3]\n" in out
    assert "  --checkpoint.keep       how many of the newest checkpoints to keep" in out
    assert "--hidden" not in loopkit.ok("fit", "--help")


def test_a_run_directory_in_use_is_refused_with_exit_code_73(loopkit, shapes):
    loopkit.ok("fit", shapes, "--run_dir", "r")
    code, _, err = loopkit("fit", shapes, "--run_dir", "r")
    assert code == 73
    assert "resume" in err


def test_resume_continues_from_the_last_checkpoint(loopkit, shapes, tmp_path):
    loopkit.ok("fit", shapes, "--run_dir", "r")
    loopkit.ok("fit", shapes, "--run_dir", "r", "--resume", "auto", "--epochs", "2")
    assert state(tmp_path / "r").meta["step"] == 4


def test_when_no_checkpoint_can_be_trusted_the_exit_code_is_65(loopkit, shapes, tmp_path):
    loopkit.ok("fit", shapes, "--run_dir", "r")
    for file in (tmp_path / "r").rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, _, err = loopkit("fit", shapes, "--run_dir", "r", "--resume", "auto", "--epochs", "2")
    assert code == 65
    assert "can be trusted" in err


@pytest.mark.parametrize(
    "words",
    [
        ["--hooks+=Shout('one')", "--hooks+=Shout(times=2, word=hey)"],
        ["--hooks", "[\"Shout('one')\", shapes.Shout]", "--hooks.times", "2"],
        [
            "--hooks",
            "[{class_path: Shout, init_args: {word: one}}]",
            "--hooks+=Shout",
            "--hooks.times=2",
        ],
    ],
)
def test_objects_are_given_with_their_arguments(loopkit, shapes, words):
    assert loopkit.ok("fit", shapes, *words).startswith("one\nhey hey\n")


def test_objects_and_names_in_one_list(loopkit, shapes, tmp_path):
    loopkit.ok("fit", shapes, "--run_dir", "r", "--loggers", "[jsonl, CsvLogger(path=own/x.csv)]")
    assert (tmp_path / "r/own/x.csv").exists()


def test_an_object_that_is_an_argument_of_another(loopkit, shapes):
    text = loopkit.ok(
        "fit", shapes, "--print-config", "--strategy", "FSDP", "--strategy.tensor.plan", "{net.0: colwise}",
        "--strategy.param_dtype", "bfloat16",
    )  # fmt: skip
    written = yaml.safe_load(text)["strategy"]
    assert written["class_path"].endswith("FSDP")
    assert written["init_args"]["tensor"] == {"plan": {"net.0": "colwise"}, "size": None}
    assert written["init_args"]["param_dtype"] == "torch.bfloat16"

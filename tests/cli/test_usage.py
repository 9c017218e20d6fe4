"""Names that are not there, at every level: one line, with what was probably meant."""

import re

import pytest


def test_help_lists_the_commands(loopkit):
    out = loopkit.ok("--help")
    assert all(
        f"  {name} " in out for name in ("fit", "evaluate", "predict", "ckpt", "report", "doctor")
    )


def test_without_a_command_the_usage_is_shown_and_the_exit_code_is_2(loopkit):
    code, out, _ = loopkit()
    assert code == 2
    assert out.startswith("usage: loopkit")


def test_version(loopkit):
    from loopkit import __version__

    assert loopkit.ok("--version") == f"loopkit {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fti"], "there is no command 'fti'. Did you mean 'fit'?"),
        (["train"], "Did you mean 'fit'?"),
        (["train.py"], "loopkit fit train.py"),
        (["--epochs", "3"], "give the command first"),
        (["fit"], "give the target first"),
        (["fit", "--epochs", "3"], "give the target first"),
        (["ckpt", "list"], "there is no command 'ckpt list'. Did you mean 'ls'?"),
        (["ckpt", "ls", ".", "--jsn"], "Did you mean '--json'?"),
        (["ckpt", "verify"], "the following arguments are required: path"),
        (["report", ".", "--al"], "Did you mean '--all'?"),
    ],
)
def test_commands(loopkit, argv, says):
    assert says in loopkit.refused(*argv)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--epohcs 3", "there is no option --epohcs. Did you mean '--epochs'?"),
        ("--epoch_s=3", "there is no option --epoch_s. Did you mean '--epochs'?"),
        ("--num_workers 3", "--num_workers. Here that is Loader(num_workers=...), returned by"),
        ("--push_to_hub true", "Here that is --hooks+=\"PushToHub('me/model')\""),
        ("--logging_first_step true", "--logging_first_step. Step 1 is always logged"),
        ("--wrkrs 3", "there is no option --wrkrs. loopkit fit /"),
        ("--ema 1", "Here that is --hooks+=EMA, from loopkit.hooks"),
        ("--swa", "Here that is --hooks+=SWA, from loopkit.hooks"),
        ("--stop 1", "there is no option --stop. loopkit fit /"),
        ("--sede 1", "Did you mean '--seed'?"),
        ("--checkpoint.save_top_k 2", "Here that is --checkpoint.keep_best"),
        ("--checkpoint.monitor loss", "Here that is --checkpoint.best eval/loss:min"),
        ("--run_name x", "Here that is the name of a logger"),
        ("--resume_from x", "Here that is --resume"),
        ("--tp_size 2", "Here that is --strategy 'TensorParallel(plan=..., size=2)'"),
        ("--hiden 3", "Did you mean '--hidden'?"),
        ("--task.hiden 3", "Did you mean '--task.hidden'? Points takes hidden, lr, seed"),
        ("--task 3", "--task needs a name: --task.NAME"),
        ("--checkpoint.evry 5", "Did you mean '--checkpoint.every'?"),
        ("--compile.mod x", "Did you mean '--compile.mode'?"),
        ("--prnt-config", "Did you mean '--print_config'?"),
        ("--num_train_epochs 3", "Here that is --epochs"),
        ("--fp16", "Here that is --precision fp16"),
        ("--save_total_limit 2", "Here that is --checkpoint.keep 3"),
        ("--eval_steps 2", "Here that is --eval_every '500 steps'"),
        ("--report_to wandb", "Here that is --loggers '[jsonl, tensorboard, wandb]'"),
        ("--learning_rate 2", "Here that is Task.optimizers: AdamW(lr=...)"),
        ("3", "unexpected argument '3'"),
    ],
)
def test_options(loopkit, shapes, words, says):
    assert says in loopkit.refused("fit", shapes, *words.split())


def test_an_abbreviation_is_no_option(loopkit, shapes):
    assert "there is no option --epoc" in loopkit.refused("fit", shapes, "--epoc", "3")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--epochs x", "epochs: 'x' is not accepted: give a number or null."),
        ("--epochs -1", "epochs=-1: here that is steps=<number> without epochs"),
        ("--epochs", "--epochs needs a value"),
        ("--run_dir", "--run_dir needs a value"),
        ("--steps 1.5", "steps: '1.5' is not accepted: give a whole number or null."),
        ("--hidden 8.5", "task.hidden: '8.5' is not accepted: give a whole number."),
        ("--momentum fast", "task.momentum: 'fast' is not accepted: give a number."),
        ("--on_nan rase", "Did you mean 'raise'?"),
        ("--precision bf61", "Did you mean 'bf16'?"),
        (
            "--checkpoint.keep x",
            "checkpoint.keep: 'x' is not accepted: give a whole number or null.",
        ),
        ("--checkpoint.keep 0", "Checkpoint(keep=0): give a whole number of at least 1"),
        ("--checkpoint.every sometimes", "Checkpoint(every='sometimes') is not a duration"),
        ("--hooks+=Shot", "hooks: there is no class 'Shot'. Did you mean 'Shout'?"),
        (
            "--hooks+=shapes.Shot",
            "hooks: shapes.Shot: module 'shapes' has no attribute 'Shot'. Did you mean 'Shout'?",
        ),
        (
            "--hooks+=Shout --hooks.wrd x",
            "hooks: Shout has no option 'wrd'. Did you mean 'word'?",
        ),
        (
            "--hooks+=Shout --hooks.times x",
            "hooks.times: 'x' is not accepted: give a whole number.",
        ),
        ("--step=nowhere.Loop", "nowhere"),
    ],
)
def test_values(loopkit, shapes, words, says):
    assert says in loopkit.refused("fit", shapes, *words.split())


def test_the_classes_that_an_option_takes_and_their_arguments(loopkit, shapes):
    out = loopkit.ok("fit", shapes, "--hooks.help")
    assert re.search(r"^  Shout +Says a word when training starts\.$", out, re.MULTILINE)
    out = loopkit.ok("fit", shapes, "--hooks.help", "Shout")
    assert out.startswith("shapes.Shout: Says a word when training starts.\n")
    assert "  --hooks.word            what is said. [str, default 'hey']\n" in out
    assert loopkit.ok("fit", shapes, "--hooks.help=shapes.Shout") == out
    assert "Did you mean 'Shout'?" in loopkit.refused("fit", shapes, "--hooks.help", "Shot")
    assert "only hooks, loggers, strategy" in loopkit.refused("fit", shapes, "--epochs.help")


def test_what_a_constructor_raises_keeps_its_traceback_from_the_users_code_on(loopkit, tmp_path):
    tmp_path.joinpath("breaks.py").write_text(
        "from loopkit import Task\nclass Breaks(Task):\n    def __init__(self):\n        1 / 0\n"
    )
    code, _, err = loopkit("fit", "breaks.py")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "breaks.py" in err
    assert "/cli/" not in err


def test_help_fits_the_terminal(loopkit, shapes, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands = ("fit", "evaluate", "predict")
    pages = [["--help"], ["ckpt"], ["bench"], *([name, "shapes.py", "--help"] for name in commands)]
    pages += [["fit", "shapes.py", "--hooks.help"], ["fit", "shapes.py", "--strategy.help", "FSDP"]]
    for argv in pages:
        _, out, _ = loopkit(*(shapes if word == "shapes.py" else word for word in argv))
        long = [line for line in out.splitlines() if len(line) > 80 and shapes not in line]
        assert not long, argv


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--hooks", "Shout"],
            "hooks: 'Shout' is not a list: give --hooks '[Shout]', or --hooks+='Shout'",
        ),
        (["--hooks.word", "x"], "hooks: add an item first, as --hooks+=NAME, then its word"),
        (["--strategy.device", "cpu"], "strategy: device: give the name of the class first"),
        (["--strategy", "ddp", "--strategy.timeout", "3"], "no class 'ddp'. Did you mean 'DDP'?"),
        (["--strategy", "TensorParalel"], "Did you mean 'TensorParallel'?"),
        (["--strategy", "TensorParallel"], "TensorParallel needs plan"),
        (["--strategy", "TensorParallel()"], "TensorParallel needs plan"),
        (["--hooks+={class_path: "], "hooks: '{class_path: ' is not accepted: give Hook."),
        (
            ["--loggers", "[jsonl, {class_path: loopkit.loggers.NoLogger}]"],
            "no attribute 'NoLogger'",
        ),
        (
            ["--hooks+=EarlyStop(monitor='eval/loss')"],
            "EarlyStop has no option 'monitor': here that is metric",
        ),
    ],
)
def test_objects_and_lists(loopkit, shapes, words, says):
    assert says in loopkit.refused("fit", shapes, *words)

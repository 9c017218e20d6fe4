"""``loopkit eject``: the script gives the weights of ``loopkit fit`` without loopkit, bit for bit."""

import json
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from loopkit.checkpoint import load_snapshot
from loopkit.cli.eject.schedule import schedule_context
from loopkit.cli.eject.script import render
from loopkit.cli.main import main
from loopkit.data import sampler
from loopkit.durations import RunLength
from loopkit.optim import schedules
from tests.cli.conftest import TASKS
from tests.cli.eject_scripts import (
    CHARLM,
    CONTRASTIVE,
    DIFFUSION,
    DIGITS,
    DISTILL,
    EMAIL,
    FAST,
    GAN,
    IMAGES,
    LANGUAGE,
    LORA,
    PPO,
    QA,
    SAM,
    SENTIMENT,
    SUMMARIZE,
    TAGGING,
    VARIED,
    WRAPPED,
    assert_equal,
    run_scripts,
)  # fmt: skip

# For each run: its target and options. The tasks take 50 steps, the others a few more than an epoch.
RUNS = {
    "charlm": f"{CHARLM} --steps 50 --batch-size 8 --clip-norm 1.0 --width 16 --folder {EMAIL}",
    "digits": f"{DIGITS} --steps 50",
    "gan": f"{GAN} --steps 50 --hidden 16",
    "sam": f"{SAM} --steps 50",
    "sentiment": f"{SENTIMENT} --steps 50 --width 16 --layers 1 --clip-norm 1.0 --batch-size 16",
    "packed language model": f"{LANGUAGE} --steps 50 --width 16 --layers 1 --pieces 300 --batch-size 4",
    "padding-free Llama": f"{LANGUAGE} --kind llama --batches flat --steps 50 --width 16 --layers 1 --batch-size 4",
    "tagging": f"{TAGGING} --steps 50 --width 16 --layers 1 --batch-size 8",
    "qa": f"{QA} --steps 50 --width 16 --layers 1 --batch-size 8 --clip-norm 1.0",
    "summarize": f"{SUMMARIZE} --steps 50 --width 16 --layers 1 --batch-size 8 --accumulate 2",
    "tagging, accumulated": f"{TAGGING} --steps 5 --width 16 --layers 1 --batch-size 6 --accumulate 3",
    "a loss and batches of its own": f"{WRAPPED}:Scored --steps 4",
    "columns": f"{WRAPPED}:Scored --own false --steps 4 --batch-size 16 --accumulate 2",
    "gan, accumulated": f"{GAN} --steps 5 --hidden 16 --accumulate 2 --clip-norm 0.1 --batch-size 8",
    "sam, bf16": f"{SAM} --steps 8 --precision bf16 --accumulate 2 --on-nan ignore",
    "a step of its own": f"{VARIED}:Repeated --steps 9 --batch-size 16 --clip-value 0.01",
    "several updates": f"{VARIED}:Repeated --steps 5 --batch-size 8 --accumulate 3 --precision fp64",
    "several optimizers": f"{VARIED}:Several --steps 15 --batch-size 16",
    "digits, accumulated": f"{DIGITS} --epochs 1.2 --batch-size 24 --accumulate 4 --clip-norm 0.5",
    "digits with wrong labels": f"{SAM}:NoisyDigits --rho 0 --steps 6 --data-seed 3",
    "data that the task makes": f"{PPO} --games 8 --moves 8 --passes 2 --hidden 8 --steps 50 --batch-size 2",
    "diffusion": f"{DIFFUSION} --steps 50 --batch-size 8 --width 16 --clip-norm 1.0",
    "images": f"{IMAGES} --steps 50 --batch-size 8 --width 16 --layers 1",
    "an averaged teacher": f"{CONTRASTIVE} --steps 50 --batch-size 16 --width 8",
    "distillation": f"{DISTILL} --steps 50 --width 4",
    "dropout": f"{VARIED}:Classes --epochs 2 --batch-size 16 --seed 5",
    "a list as argument": f"{VARIED}:Classes --words [a,b] --hidden 5 --steps 6",
    "groups": f"{VARIED}:Groups --epochs 2 --batch-size 8 --accumulate 2 --clip-value 0.01",
    "frozen": f"{VARIED}:Frozen --epochs 1.5 --batch-size 16",
    "bf16": f"{VARIED}:Classes --steps 6 --precision bf16",
    "fp16": f"{VARIED}:Classes --steps 6 --precision fp16 --accumulate 2 --batch-size 20",
    "fp64": f"{VARIED}:Classes --steps 6 --precision fp64",
    "bf16-true": f"{VARIED}:Classes --steps 6 --precision bf16-true",
    "tf32, deterministic": f"{VARIED}:Classes --steps 6 --precision tf32 --deterministic",
    "limits": f"{VARIED}:Classes --steps 9 --batch-size 8 --limit-train 0.5 --on-nan skip",
    "one batch": f"{VARIED}:Classes --steps 6 --overfit 1 --on-nan ignore",
    "samples": f"{VARIED}:Read --how tuple --steps 6",
    "samples in accumulated steps": f"{VARIED}:Read --steps 7 --batch-size 8 --accumulate 3",
    "workers": f"{VARIED}:Read --how dict --steps 10",
    "padding": f"{VARIED}:Read --how padded --steps 15 --batch-size 8",
    "drawn by weight": f"{VARIED}:Read --how drawn --steps 10 --batch-size 8",
    "a DataLoader": f"{VARIED}:Read --how dataloader --steps 12",
    "weights": f"{VARIED}:Weighted --steps 6 --accumulate 3 --batch-size 10",
    "weights as tensors": f"{VARIED}:Weighted --kind tensor --steps 6 --accumulate 3 --batch-size 10",
    "torch's own": f"{VARIED}:Own --steps 6",
}  # fmt: skip
OF_TRANSFORMERS = (LANGUAGE, SENTIMENT, TAGGING, WRAPPED)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The scripts of all runs, and their checkpoints, in one folder."""
    folder = tmp_path_factory.mktemp("scripts")
    before = list(sys.path)
    sys.path.insert(0, str(TASKS))
    calls = []
    for number, options in enumerate(RUNS.values()):
        path = folder / f"{number}.py"
        assert main(["eject", *options.split(), *FAST.split(), "--out", str(path)]) == 0
        calls.append(["", str(path), "--checkpoint", str(folder / f"{number}.pt")])
    sys.path[:] = before
    run_scripts(*calls)
    return folder


@pytest.mark.filterwarnings("ignore:.*BatchNorm")
@pytest.mark.parametrize("name", RUNS)
def test_the_script_gives_the_weights_of_fit(loopkit, scripts, tmp_path, name):
    loopkit.ok("fit", *RUNS[name].split(), "--run-dir", "r", *FAST.split())
    assert_equal(tmp_path / "r", scripts / f"{list(RUNS).index(name)}.pt")


def test_the_script_of_adapters_saves_them_alone_with_the_weights_of_fit(loopkit, tmp_path):
    pytest.importorskip("peft")
    from tests.tasks.model_jobs import made

    texts = [json.dumps({"text": f"The number {i} comes before {i + 1}."}) for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    base = made("llama", tmp_path)
    for part in (base.model, base.tokenizer):
        part.save_pretrained(tmp_path / "base")
    words = [LORA, "--model", "base", "--data", "texts.jsonl", "--context", "16"]
    words += ["--steps", "50", "--batch-size", "4", "--dropout", "0.1"]
    loopkit.ok("eject", *words, "--out", "script.py")
    run_scripts(["", str(tmp_path / "script.py"), "--checkpoint", str(tmp_path / "s.pt")])
    loopkit.ok("fit", *words, "--run-dir", "r", *FAST.split())
    assert_equal(tmp_path / "r", tmp_path / "s.pt")


def test_the_script_writes_an_order_that_takes_no_memory(loopkit, monkeypatch, tmp_path):
    monkeypatch.setattr(sampler, "MANY", 1_000)
    words = [DIGITS, "--steps", "50"]
    loopkit.ok("eject", *words, "--out", "script.py")
    script = tmp_path / "script.py"
    assert "randperm" not in script.read_text()
    run_scripts(["", str(script), "--checkpoint", str(tmp_path / "s.pt")])
    loopkit.ok("fit", *words, "--run-dir", "r", *FAST.split())
    assert_equal(tmp_path / "r", tmp_path / "s.pt")


def test_scripts_are_formatted_and_lint_clean(scripts):
    ruff = [sys.executable, "-m", "ruff"]
    rules = "--select=E,F,W,I,UP,B,C4,SIM,RUF,PIE,RET,TID,D103 --ignore=B905,RET505,E501"
    for command in (["format", "--diff"], ["check", *rules.split()]):
        found = subprocess.run(
            [*ruff, *command, "--isolated", "--line-length=100", str(scripts)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stdout + found.stderr


def test_only_what_the_run_uses_is_written(scripts):
    plain = (scripts / f"{list(RUNS).index('digits')}.py").read_text()
    for absent in ("loopkit.", "dist.", "scaler", "autocast", "clip_", "islice", "DataLoader"):
        assert absent not in plain
    for absent in (
        "def eval_step",
        "def optimizers",
        "def metrics",
        "torchmetrics",
        "def main()\n",
    ):
        assert absent not in plain


RESUMED = {
    "in the middle of an epoch": f"{DIGITS} --steps 14 --batch-size 24 --accumulate 2",
    "host's random numbers, workers": f"{VARIED}:Read --how dict --steps 14 --seed 7",
    "a scheduler of torch": f"{VARIED}:Own --steps 14",
    "a loss scaler": f"{VARIED}:Classes --steps 14 --precision fp16",
    "two players": f"{GAN} --steps 14 --hidden 8",
}


def test_a_killed_script_resumes_to_the_same_bits(loopkit, tmp_path):
    often = ["--log-every", "1", "--checkpoint.every", "3 steps"]
    calls = []
    for number, options in enumerate(RESUMED.values()):
        loopkit.ok("eject", *options.split(), *often, "--out", f"{number}.py")
        script = str(tmp_path / f"{number}.py")
        whole, killed = (str(tmp_path / f"{kind}{number}.pt") for kind in ("whole", "killed"))
        calls += [
            ["", script, "--checkpoint", whole],
            ["step 8 ", script, "--checkpoint", killed],
            ["", script, "--checkpoint", killed, "--resume"],
        ]
    run_scripts(*calls)
    for number, name in enumerate(RESUMED):
        whole, killed = (
            torch.load(tmp_path / f"{kind}{number}.pt", weights_only=True)
            for kind in ("whole", "killed")
        )
        assert whole["step"] == killed["step"] == 14
        assert whole.keys() == killed.keys(), name
        states = {"model", "optimizer", "optimizers"} & whole.keys()
        for key in states:
            torch.testing.assert_close(whole[key], killed[key], rtol=0, atol=0, msg=name)
        rest = whole.keys() - states
        assert {key: whole[key] for key in rest} == {key: killed[key] for key in rest}, name


SCHEDULES = [
    schedules.constant(),
    schedules.constant(warmup=7),
    schedules.linear(warmup="10%", floor=0.1),
    schedules.cosine(warmup="0.5 epochs", floor=0.05),
    schedules.cosine(cycles=1.5),
    schedules.cosine_restarts(cycles=3, warmup=5, floor=0.2),
    schedules.polynomial(power=2.5, warmup="2.5%"),
    schedules.inverse_sqrt(warmup=9),
    schedules.inverse_sqrt(),
    schedules.inverse_sqrt(timescale="20%"),
    schedules.wsd(warmup="5%", floor=0.01),
    schedules.wsd(decay=13, shape="1-sqrt"),
    schedules.wsd(decay="1 epoch", shape="linear", warmup=3),
    schedules.warm_restarts(T_0=10, floor=0.1),
    schedules.warm_restarts(T_0="1 epoch", T_mult=2, warmup=4),
    schedules.one_cycle(),
    schedules.one_cycle(pct_start=0.4, start=0.1, end=0.001),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize(("steps", "per_epoch"), [(100, 20), (37, 11), (1, 1), (2, 1)])
def test_the_written_schedule_is_the_schedule_at_every_step(schedule, steps, per_epoch):
    names = {"math": math, "Fraction": Fraction}
    context = schedule_context(schedule)
    exec(render("schedule", context), names)
    expected = schedule.resolve(RunLength(steps_per_epoch=per_epoch, steps=steps))
    extra = [per_epoch] if context["needs_epoch"] else []
    for step in range(steps):
        assert names["factor"](step, steps, *extra) == expected(step)


REFUSED = {
    f"{GAN} --strategy ddp": "GanStep, a step of your own, under strategy='ddp'",
    f"{GAN} --precision fp16": "GanStep, a step of your own, with precision='fp16'",
    f"{CONTRASTIVE} --strategy ddp": "all_gather under strategy='ddp'",
    f"{SAM} --on-nan skip": "SamStep, a step of your own, with on_nan='skip'",
    f"{VARIED}:Several --strategy ddp": "several optimizers under strategy='ddp'",
    f"{VARIED}:Repeated --weighted true": "the weight that Repeated.train_step returns",
    f"{VARIED}:Watching": "run.progress in varied.py",
    f"{WRAPPED}:Reaches": "HFTask._call in wrapped.py",
    f"{DIGITS} --hooks [EMA]": "the hook EMA",
    f"{DIGITS} --hooks [SWA]": "the hook SWA",
    f"{DIGITS} --strategy fsdp": "strategy='fsdp'",
    f"{DIGITS} --compile": "compile=True",
    f"{DIGITS} --time 30": "time=30",
    f"{DIGITS} --rng stream": "rng='stream'",
    f"{DIGITS} --checkpoint.best eval/loss:min --checkpoint.load_best": "load_best",
    f"{VARIED}:Plateau": "a schedule that follows a metric",
    f"{VARIED}:Streamed": "read as a stream",
    f"{VARIED}:Listening": "Listening.on_step_end, which uses its arguments",
    f"{VARIED}:Recalls": "use of hparams",
    f"{VARIED}:Borrows": "uses loopkit's mix",
    f"{VARIED}:Named": "SEED, a name of your file",
}


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: words.rpartition("/")[2])
def test_what_cannot_be_written_is_refused_by_name(loopkit, words):
    said = loopkit.refused("eject", *words.split())
    assert REFUSED[words] in said
    assert ": " in said.removeprefix("eject cannot write ")


def test_an_existing_file_is_not_overwritten(loopkit, tmp_path):
    (tmp_path / "train.py").write_text("mine")
    assert "exists" in loopkit.refused("eject", DIGITS, "--out", "train.py")
    assert (tmp_path / "train.py").read_text() == "mine"


def test_without_out_the_script_is_printed(loopkit):
    printed = loopkit.ok("eject", DIGITS, "--epochs", "1")
    compile(printed, "printed", "exec")
    assert "loopkit fit" in printed


def test_what_is_left_out_is_named(loopkit):
    printed = loopkit.ok("eject", DIGITS, "--hooks", "[LRMonitor]")
    assert "Left out, because no weight depends on it: evaluation, loggers, LRMonitor." in printed


def test_the_same_command_makes_the_same_weights(loopkit, tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(1 if name == "a" else 2)
        loopkit.ok("fit", DIGITS, "--steps", "2", "--run-dir", name, *FAST.split())
    first, second = (load_snapshot(tmp_path / name).tensors["model"] for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)

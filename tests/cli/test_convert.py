"""convert-args: Trainer arguments become a Fit that can be built, with what is lost said."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from loopkit import Checkpoint, Fit
from loopkit.cli.convert_args import convert
from loopkit.cli.convert_optim import OPTIMIZERS, SCHEDULES
from loopkit.cli.main import main
from loopkit.errors import OptionError
from loopkit.foreign_names import TRAINER_NAMES
from tests.cli.trainer_fields import BESIDE, VERSION_4, VERSION_5

GUIDE = {
    "output_dir": "out", "num_train_epochs": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4,
    "evaluation_strategy": "steps", "eval_steps": 200, "save_strategy": "steps", "save_steps": 200,
    "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "f1", "greater_is_better": True,
    "warmup_ratio": 0.1, "learning_rate": 2e-5, "weight_decay": 0.01, "lr_scheduler_type": "cosine", "fp16": True,
    "gradient_checkpointing": True, "dataloader_num_workers": 4, "logging_steps": 50, "push_to_hub": True,
    "report_to": "tensorboard", "max_grad_norm": 0.5, "seed": 7,
}  # fmt: skip


def built(source: str) -> dict:
    """Run the printed source up to its last line, as an import of it would; returns its names."""
    space = {"__name__": "pasted"}
    exec(source, space)
    return space


def test_the_guides_arguments_become_a_fit_that_can_be_built(tmp_path, capsys):
    (tmp_path / "args.json").write_text(json.dumps(GUIDE))
    assert main(["convert-args", str(tmp_path / "args.json")]) == 0
    space = built(capsys.readouterr().out)
    options = space["fit"].options
    assert (options.run_dir, options.epochs, options.batch_size, options.accumulate) == (
        "out",
        3,
        8,
        4,
    )
    assert (
        options.precision,
        options.activation_checkpointing,
        options.clip_norm,
        options.seed,
    ) == (
        "fp16",
        "full",
        0.5,
        7,
    )
    assert (options.eval_every, options.log_every) == ("200 steps", "50 steps")
    assert options.checkpoint == Checkpoint(
        every="200 steps", keep=2, best="eval/f1:max", load_best=True
    )
    spec = space["task"].optimizers()
    assert (spec.optimizer.__name__, spec.lr, spec.weight_decay) == ("AdamW", 2e-5, 0.01)
    assert (spec.schedule.name, str(spec.schedule.warmup)) == ("cosine", "10%")
    assert space["task"].train_data().num_workers == 4


def test_what_is_not_given_is_what_the_trainer_would_do():
    found = convert({})
    assert found.fit["epochs"] == "3"
    assert found.fit["batch_size"] == "8"
    assert found.fit["clip_norm"] == "1"
    assert found.fit["eval_every"] == "'never'"
    assert found.optimizer == "AdamW(lr=5e-05, weight_decay=0.0, schedule=linear())"
    assert found.checkpoint == {"every": "'500 steps'", "keep": "None"}


def test_a_delay_counts_what_the_cadence_counts():
    steps = convert({"eval_strategy": "steps", "eval_steps": 10, "eval_delay": 40})
    epochs = convert({"eval_strategy": "epoch", "eval_delay": 1.5})
    assert [built(found.source())["fit"].options.eval_after for found in (steps, epochs)] == [
        "40 steps",
        "1.5 epochs",
    ]
    assert "eval_after" not in convert({"eval_delay": 0}).fit


def test_what_is_lost_is_said():
    assert "use_liger_kernel: apply the kernels" in convert({"use_liger_kernel": True}).source()
    assert convert({"use_liger_kernel": False}).notes == {}
    assert "no logger for neptune" in convert({"report_to": ["wandb", "neptune"]}).source()


@pytest.mark.parametrize(
    ("given", "loggers"),
    [
        ({"report_to": ["wandb", "comet_ml"]}, ["jsonl", "wandb", "comet"]),
        ({"report_to": "none"}, ["jsonl"]),
        ({"report_to": "all"}, ("jsonl", "tensorboard")),
        ({}, ("jsonl", "tensorboard")),
    ],
)
def test_what_is_reported_to_becomes_loggers(given, loggers):
    assert built(convert(given).source())["fit"].options.loggers == loggers


def test_a_run_name_and_a_project_make_an_object_of_a_logger():
    source = convert({"report_to": "mlflow", "run_name": "first", "project": "digits"}).source()
    _, logger = built(source)["fit"].options.loggers
    assert (type(logger).__name__, logger._project, logger._run_name) == (
        "MLflowLogger",
        "digits",
        "first",
    )


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ({}, "PushToHub('out', 'every_save')"),
        (
            {"hub_model_id": "me/x", "hub_strategy": "checkpoint", "hub_private_repo": True},
            "PushToHub('me/x', 'checkpoint', private=True)",
        ),
    ],
)
def test_an_upload_becomes_a_hook(given, source):
    found = convert({"push_to_hub": True, "output_dir": "some/out", **given})
    assert source in found.source()
    (hook,) = built(found.source())["fit"].options.hooks
    assert type(hook).__name__ == "PushToHub"


@pytest.mark.parametrize(
    ("given", "source"),
    [
        (
            {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 10},
            "DDP(find_unused_parameters=True, bucket_cap_mb=10)",
        ),
        ({"fsdp": "full_shard auto_wrap"}, "FSDP()"),
        (
            {
                "fsdp": "full_shard auto_wrap offload",
                "fsdp_config": {"min_num_params": 2000, "backward_prefetch": "backward_pre"},
            },
            "FSDP(offload=True, wrap=2000, prefetch=1)",
        ),
        (
            {
                "fsdp": True,
                "fsdp_config": {
                    "transformer_layer_cls_to_wrap": ["BertLayer"],
                    "reshard_after_forward": False,
                },
            },
            "FSDP(reshard_after_forward=False, wrap=['BertLayer'])",
        ),
        ({"fsdp": "", "deepspeed": None}, None),
    ],
)
def test_several_devices_become_a_strategy(given, source):
    found = convert(given)
    assert found.fit.get("strategy") == source
    if source:
        strategy = built(found.source())["fit"].options.strategy
        assert type(strategy).__name__ == source.partition("(")[0]
    assert not found.notes


def test_a_python_file_is_read_and_not_run(tmp_path, capsys):
    (tmp_path / "args.py").write_text(
        "raise SystemExit('run')\nargs = TrainingArguments(output_dir='x', max_steps=100, "
        "bf16=True, warmup_steps=5)\n"
    )
    assert main(["convert-args", str(tmp_path / "args.py")]) == 0
    space = built(capsys.readouterr().out)
    assert (space["fit"].options.steps, space["fit"].options.precision) == (100, "bf16")
    assert str(space["task"].optimizers().schedule.warmup) in ("5", "5 steps")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_the_trainer_has_one_here(name):
    space = built(convert({"lr_scheduler_type": name, "warmup_steps": 0.1}).source())
    assert space["task"].optimizers().schedule


@pytest.mark.parametrize(
    ("given", "ours"), [({"tf32": True}, "tf32"), ({"tf32": True, "bf16": True}, "bf16")]
)
def test_tf32_is_a_precision(given, ours):
    assert built(convert(given).source())["fit"].options.precision == ours


def test_errors(tmp_path, capsys):
    with pytest.raises(OptionError, match=r"has no 'learning_rat'\. Did you mean 'learning_rate'"):
        convert({"learning_rat": 1})
    (tmp_path / "bad.json").write_text("[1]")
    assert main(["convert-args", str(tmp_path / "bad.json")]) == 2
    assert "it holds no object" in capsys.readouterr().err
    assert main(["convert-args"]) == 2


VERSIONS = {"5": VERSION_5, "4": VERSION_4}


def test_the_fields_are_those_of_the_installed_version():
    trainer = pytest.importorskip("transformers")
    given = trainer.Seq2SeqTrainingArguments(output_dir="out", report_to=[])
    dumped = json.loads(given.to_json_string())
    if trainer.__version__.startswith("5."):
        assert dumped.keys() == VERSION_5.keys()
    # What the machine decides differs from one to the other.
    changed = {name for name in dumped if convert({name: dumped[name]}).notes}
    assert not changed


@pytest.mark.parametrize("version", VERSIONS)
def test_a_dump_of_defaults_is_what_the_trainer_does_by_default(version):
    dump = {name: default for name, (default, _) in VERSIONS[version].items()}
    found, bare = convert(dump), convert({"output_dir": "out", "report_to": []})
    assert found.notes == {}
    assert found.source() == bare.source()


@pytest.mark.parametrize(
    ("version", "name"), [(v, name) for v, fields in VERSIONS.items() for name in fields]
)
def test_each_field_alone_is_carried_over_or_listed(version, name):
    dump = {each: default for each, (default, _) in VERSIONS[version].items()}
    dump |= BESIDE.get(name, {})
    before = convert(dump).source()
    after = convert({**dump, name: VERSIONS[version][name][1]})
    assert after.source() != before, f"{name} is lost"
    compile(after.source(), name, "exec")


@pytest.mark.parametrize("version", VERSIONS)
def test_all_fields_changed_at_once_make_a_script(version):
    found = convert({name: other for name, (_, other) in VERSIONS[version].items()})
    compile(found.source(), version, "exec")
    assert all(found.notes.values())


@pytest.mark.parametrize("fields", VERSIONS.values(), ids=VERSIONS)
def test_fit_knows_every_field(fields):
    options = Fit().options.to_dict()
    for name in fields:
        if name in options or name == "debug":
            continue
        with pytest.raises(OptionError, match=f"Fit has no option '{name}'") as error:
            Fit(**{name: True})
        assert TRAINER_NAMES[name] in str(error.value)


@pytest.mark.parametrize(
    "name", [*OPTIMIZERS, "galore_adamw", "lomo", "adamw_torch_4bit", "grokadamw"]
)
def test_an_optimizer_is_the_same_one_or_is_listed(name):
    found = convert({"optim": name, "adam_epsilon": 1e-6, "adam_beta1": 0.8})
    carried = name in OPTIMIZERS and name != "adafactor"
    assert ("optim" in found.notes) is not carried
    if "adam" in name and carried:
        assert "ademamix" in name or "betas=(0.8, 0.999)" in found.optimizer
        assert "eps=1e-06" in found.optimizer
    elif not name.startswith(("lion", "paged_lion", "galore", "lomo", "adamw", "grokadamw")):
        assert "adam_epsilon" in found.notes


@pytest.mark.parametrize(
    ("name", "kwargs", "source"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.5}, "cosine(floor=0.5)"),
        ("cosine_with_min_lr", {"min_lr": 1e-5}, "cosine(floor=0.1)"),
        ("cosine_with_restarts", {"num_cycles": 3}, "cosine_restarts(cycles=3)"),
        ("polynomial", {"power": 2.0, "lr_end": 1e-6}, "polynomial(power=2.0, floor=0.01)"),
        ("polynomial", None, "polynomial(floor=0.001)"),
        ("inverse_sqrt", {"timescale": 100}, "inverse_sqrt(timescale=100)"),
        ("warmup_stable_decay", {"num_decay_steps": 9}, "wsd(decay=9)"),
        ("reduce_lr_on_plateau", {"patience": 2, "min_lr": 1e-5}, "(patience=2, floor=0.1)"),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.5}, "cosine(floor=0.5)"),
    ],
)
def test_the_arguments_of_a_schedule_are_carried_over(name, kwargs, source):
    given = {"learning_rate": 1e-4, "lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs}
    assert source in convert(given).optimizer
    more = convert({**given, "lr_scheduler_kwargs": {**(kwargs or {}), "unheard_of": 1}})
    assert "lr_scheduler_kwargs['unheard_of']" in more.notes


def test_a_schedule_without_a_counterpart_is_listed():
    assert "greedy" in convert({"lr_scheduler_type": "greedy"}).notes["lr_scheduler_type"]
    with pytest.raises(OptionError, match="Did you mean 'linear'"):
        convert({"lr_scheduler_type": "liner"})


def test_a_choice_between_two_is_said():
    assert convert({"fp16": True, "bf16": True}).fit["precision"] == "'bf16'"
    assert "fp16" in convert({"fp16": True, "bf16": True}).notes
    both = {"deepspeed": "ds.json", "fsdp": "full_shard", "ddp_bucket_cap_mb": 25}
    assert convert(both).notes.keys() == {"fsdp", "ddp_bucket_cap_mb"}
    assert convert({"fsdp": "full_shard", "ddp_timeout": 60}).notes.keys() == {"ddp_timeout"}
    assert "metric_for_best_model" in convert({"metric_for_best_model": "f1"}).notes


def test_resume_is_from_the_newest_or_a_path():
    assert convert({"resume_from_checkpoint": True}).fit["resume"] == "'auto'"
    assert convert({"resume_from_checkpoint": "x"}).fit["resume"] == "'x'"


# Groups of arguments as guides give them.
SCRIPTS = {
    "the whole case": {
        "output_dir": "out", "num_train_epochs": 1, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64,
        "warmup_steps": 2, "weight_decay": 0.01, "logging_dir": "logs", "logging_steps": 2, "save_total_limit": 2,
        "evaluation_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "fp16": False,
        "load_best_model_at_end": True, "metric_for_best_model": "f1", "greater_is_better": True,
        "dataloader_num_workers": 1, "report_to": "tensorboard", "optim": "adamw_torch", "learning_rate": 2e-5,
    },
    "basics": {
        "max_steps": 3, "learning_rate": 2e-5, "weight_decay": 0.01, "adam_beta2": 0.98, "adam_epsilon": 1e-6,
        "warmup_ratio": 0.1, "lr_scheduler_type": "cosine", "max_grad_norm": 0.5,
    },
    "evaluate, save, log": {
        "max_steps": 4, "evaluation_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "f1", "logging_steps": 1,
        "greater_is_better": True, "logging_dir": "logs", "logging_first_step": True, "report_to": ["tensorboard"],
    },
    "memory": {
        "max_steps": 2, "bf16": True, "fp16": True, "fp16_opt_level": "O2", "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True, "dataloader_pin_memory": True, "dataloader_num_workers": 1,
    },
    "compiled": {
        "max_steps": 1, "torch_compile": True, "torch_compile_backend": "eager",
        "dataloader_drop_last": True, "dataloader_prefetch_factor": 2,
    },
    "fsdp": {
        "max_steps": 1, "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"min_num_params": 2000, "backward_prefetch": "backward_pre", "forward_prefetch": True},
    },
    "ddp": {"max_steps": 1, "ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 25},
    "seeds": {
        "max_steps": 1, "seed": 1, "data_seed": 2, "full_determinism": True, "debug": "underflow_overflow",
        "label_names": ["labels"], "include_inputs_for_metrics": True, "disable_tqdm": True,
    },
    "hub": {"max_steps": 1, "hub_model_id": "me/model", "hub_strategy": "end", "hub_private_repo": True},
    "generation": {
        "max_steps": 1, "predict_with_generate": True, "generation_max_length": 5, "eval_strategy": "epoch",
        "metric_for_best_model": "rouge1", "save_strategy": "epoch",
    },
    "smoothing": {"max_steps": 2, "label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 1},
    "sampling": {"max_steps": 1, "group_by_length": True, "dataloader_drop_last": True},
    "plateau": {
        "max_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1,
    },
    "adafactor": {"max_steps": 2, "optim": "adafactor", "auto_find_batch_size": True},
    "nothing": {"max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True},
}  # fmt: skip


def test_each_script_runs_as_it_is_printed(rank_programs, tmp_path):
    """In one process, which imports torch once; each script in a directory of its own."""
    pytest.importorskip("transformers")
    for name, given in SCRIPTS.items():
        folder = tmp_path / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        (folder / "script.py").write_text(convert({**given, "use_cpu": True}).source())
    runner = tmp_path / "runner.py"
    runner.write_text(_RUNNER)
    ran = rank_programs.run(
        [sys.executable, str(runner)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    assert ran.stdout.count("RAN") == len(SCRIPTS)


_RUNNER = """
import os, runpy, sys
from pathlib import Path
for script in sorted(Path.cwd().glob("*/script.py")):
    os.chdir(script.parent)
    print("===", script.parent.name, flush=True)
    space = runpy.run_path(str(script), run_name="__main__")
    print("RAN", flush=True)
"""

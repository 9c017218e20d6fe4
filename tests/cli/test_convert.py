"""convert-args: Trainer arguments become a Fit that can be built, with what is lost said."""

from __future__ import annotations

import json

import pytest

from loopkit import Checkpoint, Fit
from loopkit.cli.convert_args import SCHEDULES, convert
from loopkit.cli.main import main
from loopkit.errors import OptionError
from loopkit.foreign_names import TRAINER_NAMES

GUIDE = {
    "output_dir": "out", "num_train_epochs": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4,
    "evaluation_strategy": "steps", "eval_steps": 200, "save_strategy": "steps", "save_steps": 200,
    "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "f1", "greater_is_better": True,
    "warmup_ratio": 0.1, "learning_rate": 2e-5, "weight_decay": 0.01, "lr_scheduler_type": "cosine", "fp16": True,
    "gradient_checkpointing": True, "dataloader_num_workers": 4, "logging_steps": 50, "push_to_hub": True,
    "report_to": "tensorboard", "max_grad_norm": 0.5, "seed": 7,
}  # fmt: skip


def built(source: str) -> dict:
    """Run the printed source, as a person who pastes it would; returns its names."""
    space = {}
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
    spec = space["optimizers"](None)
    assert (spec.optimizer.__name__, spec.lr, spec.weight_decay) == ("AdamW", 2e-5, 0.01)
    assert (spec.schedule.name, str(spec.schedule.warmup)) == ("cosine", "10%")
    assert space["train_data"](None).num_workers == 4


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
    assert str(space["optimizers"](None).schedule.warmup) in ("5", "5 steps")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_the_trainer_has_one_here(name):
    built(convert({"lr_scheduler_type": name, "warmup_steps": 0.1}).source())["optimizers"](None)


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


# The fields of transformers 5.23's TrainingArguments.
FIELDS = [
    "output_dir",
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_target_modules",
    "gradient_accumulation_steps",
    "average_tokens_across_devices",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "bf16_full_eval",
    "fp16_full_eval",
    "tf32",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_liger_kernel",
    "liger_kernel_config",
    "use_cache",
    "neftune_noise_alpha",
    "torch_empty_cache_steps",
    "auto_find_batch_size",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "log_on_each_node",
    "logging_nan_inf_filter",
    "include_num_input_tokens_seen",
    "log_level",
    "log_level_replica",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "eval_on_start",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "eval_accumulation_steps",
    "include_for_metrics",
    "batch_eval_metrics",
    "save_only_model",
    "save_strategy",
    "save_steps",
    "save_on_each_node",
    "save_total_limit",
    "enable_jit_checkpoint",
    "push_to_hub",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_strategy",
    "hub_always_push",
    "hub_revision",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
    "full_determinism",
    "seed",
    "data_seed",
    "use_cpu",
    "accelerator_config",
    "parallelism_config",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "dataloader_in_order",
    "remove_unused_columns",
    "label_names",
    "train_sampling_strategy",
    "length_column_name",
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_backend",
    "ddp_timeout",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "debug",
    "skip_memory_metrics",
    "do_train",
    "do_eval",
    "do_predict",
    "resume_from_checkpoint",
    "local_rank",
]


def test_all_114_fields_are_known_to_the_checker():
    assert len(FIELDS) == 114
    options = Fit().options.to_dict()
    for name in FIELDS:
        if name in options or name == "debug":
            continue
        text = TRAINER_NAMES[name]
        with pytest.raises(OptionError, match=f"Fit has no option '{name}'") as error:
            Fit(**{name: True})
        assert text in str(error.value)

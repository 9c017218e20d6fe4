"""Other libraries' values, methods, attributes, events and classes, with loopkit's for each.

Sources: the Hugging Face Trainer, Lightning and accelerate, and public scripts that use them.
``loopkit.foreign_names`` has the names of arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopkit.foreign_names import Reason

_CLUSTER = Reason("loopkit trains on CPUs, CUDA GPUs and Apple GPUs only")

# By option of Fit, and then by the text of the value.
VALUES: Mapping[str, Mapping[str, str]] = {
    "precision": {
        "32": '"fp32"', "32-true": '"fp32"', "float32": '"fp32"', "no": '"fp32"', "float": '"fp32"',
        "full": '"fp32"', "16": '"fp16"', "16-mixed": '"fp16"', "float16": '"fp16"',
        "fp16-mixed": '"fp16"', "half": '"fp16-true"', "16-true": '"fp16-true"',
        "bf16-mixed": '"bf16"', "bfloat16": '"bf16"', "mixed": '"bf16" or "fp16"',
        "64": '"fp64"', "64-true": '"fp64"', "float64": '"fp64"', "double": '"fp64"',
        "None": '"fp32"',
    },
    "accelerator": {
        "gpu": '"cuda"', "None": '"auto"', "nvidia": '"cuda"', "apple": '"mps"', "tpu": _CLUSTER,
        "xla": _CLUSTER, "hpu": _CLUSTER, "npu": _CLUSTER, "xpu": _CLUSTER, "ipu": _CLUSTER,
    },
    "devices": {
        "-1": '"auto"', "None": '"auto"', "all": '"auto"',
    },
    "strategy": {
        "None": '"auto"', "single_device": '"single"', "no": '"single"', "none": '"single"',
        "dp": '"ddp"', "ddp_spawn": '"ddp"', "ddp_fork": '"ddp"', "ddp_notebook": '"ddp"',
        "ddp_sharded": '"fsdp"', "horovod": '"ddp"', "fsdp_cpu_offload": "FSDP(offload=True)",
        "ddp_find_unused_parameters_true": "DDP(find_unused_parameters=True)",
        "ddp_find_unused_parameters_false": '"ddp"',
        "deepspeed_stage_1": "DeepSpeed(stage=1)", "deepspeed_stage_2": "DeepSpeed(stage=2)",
        "deepspeed_stage_3": "DeepSpeed(stage=3)",
        "deepspeed_stage_2_offload": 'DeepSpeed(stage=2, offload_optimizer=True)',
        "deepspeed_stage_3_offload": 'DeepSpeed(stage=3, offload_optimizer=True, offload_parameters=True)',
        "zero1": "DeepSpeed(stage=1)", "zero2": "DeepSpeed(stage=2)",
        "zero3": "DeepSpeed(stage=3)", "full_shard": '"fsdp"',
        "shard_grad_op": "FSDP(reshard_after_forward=False)", "hybrid_shard": "FSDP(replicas=2)",
        "model_parallel": "TensorParallel(plan, size=2)", "tp": "TensorParallel(plan, size=2)",
    },
    "eval_every": {
        "epoch": '"1 epoch"', "steps": '"500 steps"', "no": '"never"', "None": '"never"',
        "0": '"never"', "-1": '"never"', "False": '"never"',
    },
    "log_every": {
        "epoch": '"1 epoch"', "steps": '"50 steps"', "no": '"never"', "None": '"never"',
        "0": '"never"', "-1": '"never"', "False": '"never"',
    },
    "epochs": {"-1": "steps=<number> without epochs"},
    "steps": {"-1": "None"},
    "clip_norm": {"0": "None", "0.0": "None"},
    "clip_value": {"0": "None", "0.0": "None"},
    "limit_eval": {"0": 'None with eval_every="never"', "0.0": 'None with eval_every="never"'},
    "limit_train": {"0": "None with Fit.evaluate(task)", "-1": "None"},
    "resume": {"True": '"auto"', "last": '"auto"', "latest": '"auto"', "False": "None",
               "best": 'the path of that checkpoint, result.best["checkpoint"]'},
    "compile": {"max-autotune": 'Compile(mode="max-autotune")', "inductor": "True",
                "reduce-overhead": 'Compile(mode="reduce-overhead")', "default": "True"},
    "checkpoint": {"None": "False", "epoch": 'Checkpoint(every="1 epoch")', "no": "False",
                   "best": 'Checkpoint(best="eval/loss:min")',
                   "steps": 'Checkpoint(every="500 steps")'},
    "hooks": {"None": "()"},
    "loggers": {"none": "None", "all": '("jsonl", "tensorboard", "wandb")'},
    "progress": {"None": "False", "tqdm": '"auto"'},
    "activation_checkpointing": {"True": '"full"', "False": "None"},
    "seed": {"None": "a whole number: every run is reproducible"},
}  # fmt: skip

# By method of a LightningModule, of a Trainer's subclass or of a script, the method of Task.
METHODS: Mapping[str, tuple[str, str]] = {
    "training_step": ("train_step", "train_step(self, batch)"),
    "compute_loss": ("train_step", "train_step(self, batch)"),
    "validation_step": ("eval_step", "eval_step(self, batch), which returns a dict"),
    "prediction_step": ("predict_step", "predict_step(self, batch)"),
    "configure_optimizers": ("optimizers", "optimizers(self)"),
    "create_optimizer": ("optimizers", "optimizers(self)"),
    "train_dataloader": ("train_data", "train_data(self)"),
    "get_train_dataloader": ("train_data", "train_data(self)"),
    "val_dataloader": ("eval_data", "eval_data(self)"),
    "get_eval_dataloader": ("eval_data", "eval_data(self)"),
    "test_dataloader": ("test_data", "test_data(self)"),
    "get_test_dataloader": ("test_data", "test_data(self)"),
    "predict_dataloader": ("predict_data", "predict_data(self)"),
}  # fmt: skip

# By attribute that a task does not have.
ATTRIBUTES: Mapping[str, str] = {
    "trainer": "the run, which every event gets: on_step_end(self, run, out)",
    "device": "run.strategy.device in an event; a batch is on the device already",
    "dtype": "the dtype of a parameter, as in next(self.parameters()).dtype",
    "global_step": "run.progress.step in an event",
    "current_epoch": "run.progress.epoch in an event",
    "global_rank": "run.rank in an event",
    "local_rank": "run.rank in an event",
    "log_dict": 'self.log("name", value) for each value, or return them beside the loss',
    "save_hyperparameters": Reason("leave it out: self.hparams has the arguments already"),
    "automatic_optimization": "a StepLoop of your own, returned by loops(self)",
    "manual_backward": "StepLoop.backward(run, batches)",
    "lr_schedulers": "run.schedules in an event",
    "toggle_optimizer": 'StepLoop.backward(run, batches, optimizers=["name"])',
    "untoggle_optimizer": 'StepLoop.backward(run, batches, optimizers=["name"])',
    "clip_gradients": "Fit(clip_norm=1.0)",
    "all_gather": "loopkit.all_gather(tensor) in train_step",
    "logger": "run.logger(name) in an event",
    "loggers": "run.loggers in an event",
    "print": "print in a function under loopkit.rank_zero_only",
    "freeze": "self.requires_grad_(False)",
    "unfreeze": "self.requires_grad_(True), or the hook Unfreeze",
    "load_from_checkpoint": "Task.load(path)",
    "args": "self.hparams",
    "model_wrapped": "self",
    "accelerator": "run.strategy in an event",
}  # fmt: skip

# By method or attribute of a Trainer that Fit does not have.
FIT_METHODS: Mapping[str, str] = {
    "fit": "Fit(...).run(task)",
    "train": "Fit(...).run(task)",
    "validate": "Fit(...).evaluate(task)",
    "save_model": "result.export(folder)",
    "save_checkpoint": 'run.request("save") in an event',
    "add_callback": "Fit(hooks=[...]), or fit.on(event, function)",
    "callback_metrics": "result.metrics",
    "logged_metrics": "result.metrics",
    "state": "the result that run returns",
    "push_to_hub": 'Fit(hooks=[PushToHub("me/model")])',
    "create_optimizer": "Task.optimizers",
    "compute_loss": "Task.train_step",
    "backward": "Task.train_step, which returns the loss",
}

# By method of a callback that is no event here.
EVENTS: Mapping[str, str] = {
    "on_train_begin": "on_fit_start", "on_train_start": "on_fit_start",
    "on_train_end": "on_fit_end", "on_epoch_begin": "on_epoch_start",
    "on_train_epoch_start": "on_epoch_start", "on_train_epoch_end": "on_epoch_end",
    "on_step_begin": "on_step_start", "on_train_batch_start": "on_step_start",
    "on_train_batch_end": "on_step_end", "on_batch_start": "on_step_start",
    "on_batch_end": "on_step_end", "on_substep_end": "on_micro_step_end",
    "on_after_backward": "on_micro_step_end", "on_before_backward": "on_micro_step_end",
    "on_before_optimizer_step": "on_before_update", "on_pre_optimizer_step": "on_before_update",
    "on_optimizer_step": "on_step_end", "on_before_zero_grad": "on_step_end",
    "on_evaluate": "on_eval_end", "on_validation_start": "on_eval_start",
    "on_validation_epoch_start": "on_eval_start", "on_validation_epoch_end": "on_eval_end",
    "on_validation_end": "on_eval_end", "on_validation_batch_end": "on_eval_step_end",
    "on_test_start": "on_eval_start", "on_test_epoch_start": "on_eval_start",
    "on_test_batch_end": "on_eval_step_end", "on_test_epoch_end": "on_eval_end",
    "on_test_end": "on_eval_end",
    "on_prediction_step": "on_eval_step_end", "on_predict_batch_end": "on_predict_step_end",
    "on_predict": "on_predict_step_end", "on_exception": "on_error",
    "on_keyboard_interrupt": "on_error", "on_init_end": "on_setup",
    "on_checkpoint": "on_save", "on_load_checkpoint": "load_state_dict of a Hook, or on_load",
    "on_save_checkpoint": "state_dict of a Hook, or on_save",
}  # fmt: skip

_CHECKPOINT = 'Fit(checkpoint=Checkpoint(best="eval/loss:min"))'
# By class or function of another library.
OBJECTS: Mapping[str, str] = {
    "Trainer": "loopkit.Fit", "TrainingArguments": "loopkit.Fit", "Seq2SeqTrainer": "loopkit.Fit",
    "Seq2SeqTrainingArguments": "loopkit.Fit", "Accelerator": "loopkit.Fit", "Fabric": "loopkit.Fit",
    "LightningModule": "loopkit.Task", "LightningDataModule": "train_data and eval_data of a Task",
    "DataModule": "train_data and eval_data of a Task", "DataLoader": "loopkit.Loader",
    "CombinedLoader": "loopkit.data.CombinedLoader",
    "Callback": "loopkit.Hook", "TrainerCallback": "loopkit.Hook",
    "EarlyStopping": "loopkit.hooks.EarlyStop", "EarlyStoppingCallback": "loopkit.hooks.EarlyStop",
    "ModelCheckpoint": _CHECKPOINT, "LearningRateMonitor": "loopkit.hooks.LRMonitor",
    "DeviceStatsMonitor": "loopkit.hooks.Throughput", "LearningRateFinder": "loopkit.hooks.FindLR",
    "StochasticWeightAveraging": "loopkit.hooks.SWA", "EMAWeightAveraging": "loopkit.hooks.EMA",
    "WeightAveraging": "loopkit.hooks.EMA", "ThroughputMonitor": "loopkit.hooks.Throughput",
    "BaseFinetuning": "loopkit.hooks.Unfreeze", "BackboneFinetuning": "loopkit.hooks.Unfreeze",
    "RichModelSummary": "loopkit.hooks.ModelSummary", "TQDMProgressBar": "Fit(progress=...)",
    "RichProgressBar": 'Fit(progress="rich")', "ProgressCallback": "Fit(progress=...)",
    "GradientAccumulationScheduler": "Fit(accumulate=...)", "Timer": 'Fit(time="2 h")',
    "seed_everything": "Fit(seed=...)", "set_seed": "Fit(seed=...)",
    "DDPStrategy": "loopkit.DDP", "FSDPStrategy": "loopkit.FSDP",
    "DeepSpeedStrategy": "loopkit.DeepSpeed", "SingleDeviceStrategy": "loopkit.SingleDevice",
    "ModelParallelStrategy": "loopkit.TensorParallel",
    "TensorBoardLogger": "loopkit.loggers.tensorboard.TensorBoardLogger",
    "CSVLogger": "loopkit.loggers.csv.CsvLogger",
    "get_cosine_schedule_with_warmup": "loopkit.optim.cosine(warmup=...)",
    "get_linear_schedule_with_warmup": "loopkit.optim.linear(warmup=...)",
    "CosineAnnealingLR": "loopkit.optim.cosine()", "LinearLR": "loopkit.optim.linear()",
}  # fmt: skip


def answer(table: Mapping[str, str], name: str) -> str:
    """Return ``: here that is …`` for a name in ``table``, or its reason; "" for any other name."""
    if name not in table:
        return ""
    meant = table[name]
    return f": {meant}" if isinstance(meant, Reason) else f": here that is {meant}"


def answer_value(option: str, value: Any) -> str:
    """Return the answer to another library's value of an option of Fit; "" for any other value."""
    table = VALUES.get(option, {})
    if option == "devices" and isinstance(value, (list, tuple)) and value:
        listed = ",".join(map(str, value))
        return f": here that is {len(value)}, with CUDA_VISIBLE_DEVICES={listed}"
    if option == "devices" and isinstance(value, str) and value.isdigit() and value != "0":
        return f": here that is {value}, a number"
    if option in ("eval_every", "log_every") and isinstance(value, float) and 0 < value <= 1:
        return f': here that is "{value:g} epochs" or "{value:.0%}" of the run'
    if isinstance(value, (str, int, float, type(None))):
        return answer(table, str(value).lower() if isinstance(value, str) else str(value))
    return ""


def missing_attribute(module: str, name: str) -> Exception:
    """Return the error of a module's ``__getattr__`` for a name that it does not have.

    ``from module import name`` hides an AttributeError, so a known name gives an ImportError.
    """
    if name in OBJECTS and OBJECTS[name] != f"{module}.{name}":
        return ImportError(f"{module} has no {name}{answer(OBJECTS, name)}")
    return AttributeError(f"module {module!r} has no attribute {name!r}")

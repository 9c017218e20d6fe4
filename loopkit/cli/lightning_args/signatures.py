"""The arguments of Lightning's Trainer, callbacks, loggers, strategies and plugins, with defaults.

``...`` stands for a value that must be given, or whose default is an object. A test compares the
tables with the signatures of the installed Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIGNATURES: Mapping[str, Mapping[str, Any]] = {
    "Trainer": {
        "accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": None,
        "logger": None, "callbacks": None, "fast_dev_run": False, "max_epochs": None, "min_epochs": None,
        "max_steps": -1, "min_steps": None, "max_time": None, "limit_train_batches": None,
        "limit_val_batches": None, "limit_test_batches": None, "limit_predict_batches": None,
        "overfit_batches": 0.0, "val_check_interval": None, "check_val_every_n_epoch": 1,
        "num_sanity_val_steps": None, "log_every_n_steps": None, "enable_checkpointing": None,
        "enable_progress_bar": None, "enable_model_summary": None, "accumulate_grad_batches": 1,
        "gradient_clip_val": None, "gradient_clip_algorithm": None, "deterministic": None, "benchmark":
        None, "inference_mode": True, "use_distributed_sampler": True, "profiler": None, "detect_anomaly":
        False, "barebones": False, "plugins": None, "sync_batchnorm": False,
        "reload_dataloaders_every_n_epochs": 0, "default_root_dir": None, "enable_autolog_hparams": True,
        "model_registry": None,
    },
    "ModelCheckpoint": {
        "dirpath": None, "filename": None, "monitor": None, "verbose": False, "save_last": None,
        "save_top_k": 1, "save_on_exception": False, "save_weights_only": False, "mode": "min",
        "auto_insert_metric_name": True, "every_n_train_steps": None, "train_time_interval": None,
        "every_n_epochs": None, "save_on_train_epoch_end": None, "enable_version_counter": True,
    },
    "EarlyStopping": {
        "monitor": ..., "min_delta": 0.0, "patience": 3, "verbose": False, "mode": "min", "strict": True,
        "check_finite": True, "stopping_threshold": None, "divergence_threshold": None,
        "check_on_train_epoch_end": None, "log_rank_zero_only": False,
    },
    "LearningRateMonitor": {
        "logging_interval": None, "log_momentum": False, "log_weight_decay": False,
    },
    "StochasticWeightAveraging": {
        "swa_lrs": ..., "swa_epoch_start": 0.8, "annealing_epochs": 10, "annealing_strategy": "cos",
        "avg_fn": None, "device": ...,
    },
    "EMAWeightAveraging": {
        "device": None, "use_buffers": True, "decay": 0.999, "update_every_n_steps": 1,
        "update_starting_at_step": None, "update_starting_at_epoch": None,
    },
    "RichProgressBar": {
        "refresh_rate": 100, "leave": False, "theme": ..., "console_kwargs": None,
    },
    "TQDMProgressBar": {
        "refresh_rate": 1, "process_position": 0, "leave": False,
    },
    "ModelSummary": {
        "max_depth": 1,
    },
    "RichModelSummary": {
        "max_depth": 1,
    },
    "DeviceStatsMonitor": {
        "cpu_stats": None,
    },
    "ThroughputMonitor": {
        "batch_size_fn": ..., "length_fn": None,
    },
    "Timer": {
        "duration": None, "interval": ..., "verbose": True,
    },
    "TensorBoardLogger": {
        "save_dir": ..., "name": "lightning_logs", "version": None, "log_graph": False, "default_hp_metric":
        True, "prefix": "", "sub_dir": None,
    },
    "CSVLogger": {
        "save_dir": ..., "name": "lightning_logs", "version": None, "prefix": "",
        "flush_logs_every_n_steps": 100,
    },
    "WandbLogger": {
        "name": None, "save_dir": ".", "version": None, "offline": False, "dir": None, "id": None,
        "anonymous": None, "project": None, "log_model": False, "experiment": None, "prefix": "",
        "checkpoint_name": None, "add_file_policy": "mutable",
    },
    "MLFlowLogger": {
        "experiment_name": "lightning_logs", "run_name": None, "tracking_uri": None, "tags": None,
        "save_dir": "./mlruns", "log_model": False, "prefix": "", "artifact_location": None, "run_id": None,
        "synchronous": None,
    },
    "CometLogger": {
        "api_key": None, "workspace": None, "project": None, "experiment_key": None, "mode": None, "online":
        None, "prefix": None,
    },
    "DDPStrategy": {
        "accelerator": None, "parallel_devices": None, "cluster_environment": None, "checkpoint_io": None,
        "precision_plugin": None, "ddp_comm_state": None, "ddp_comm_hook": None, "ddp_comm_wrapper": None,
        "model_averaging_period": None, "process_group_backend": None, "timeout": ..., "start_method":
        "popen",
    },
    "FSDPStrategy": {
        "accelerator": None, "parallel_devices": None, "cluster_environment": None, "checkpoint_io": None,
        "precision_plugin": None, "process_group_backend": None, "timeout": ..., "cpu_offload": None,
        "mixed_precision": None, "auto_wrap_policy": None, "activation_checkpointing": None,
        "activation_checkpointing_policy": None, "sharding_strategy": "FULL_SHARD", "state_dict_type":
        "full", "device_mesh": None,
    },
    "SingleDeviceStrategy": {
        "device": "cpu", "accelerator": None, "checkpoint_io": None, "precision_plugin": None,
    },
    "PyTorchProfiler": {
        "dirpath": None, "filename": None, "group_by_input_shapes": False, "emit_nvtx": False,
        "export_to_chrome": True, "row_limit": 20, "sort_by_key": None, "record_module_names": True,
        "table_kwargs": None,
    },
    "MixedPrecision": {
        "precision": ..., "device": ..., "scaler": None,
    },
    "HalfPrecision": {
        "precision": "16-true",
    },
    "DeepSpeedPrecision": {
        "precision": ...,
    },
    "FSDPPrecision": {
        "precision": ..., "scaler": None,
    },
}  # fmt: skip

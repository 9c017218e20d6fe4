"""The arguments of a Hugging Face Trainer: their defaults, and which of them a conversion used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The Trainer's defaults that are neither None, False, 0 nor empty, of versions 4 and 5.
DEFAULTS: Mapping[str, Any] = {
    "output_dir": "trainer_output", "num_train_epochs": 3.0, "max_steps": -1, "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "seed": 42,
    "learning_rate": 5e-5, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "optim": "adamw_torch",
    "lr_scheduler_type": "linear", "eval_strategy": "no", "save_strategy": "steps", "save_steps": 500,
    "logging_strategy": "steps", "logging_steps": 500, "logging_nan_inf_filter": True, "log_level": "passive",
    "log_level_replica": "warning", "log_on_each_node": True, "save_safetensors": True, "fp16_opt_level": "O1",
    "fp16_backend": "auto", "half_precision_backend": "auto", "local_rank": -1, "past_index": -1, "ray_scope": "last",
    "average_tokens_across_devices": True, "dataloader_pin_memory": True, "dataloader_in_order": True,
    "remove_unused_columns": True, "length_column_name": "length", "train_sampling_strategy": "random",
    "eval_do_concat_batches": True, "skip_memory_metrics": True, "ddp_timeout": 1800, "project": "huggingface",
    "hub_strategy": "every_save", "include_num_input_tokens_seen": "no", "trackio_space_id": "trackio",
}  # fmt: skip
# Other values that mean the same as the default. A dump has "<HUB_TOKEN>" with and without a token.
_SAME: Mapping[str, tuple[Any, ...]] = {
    "optim": ("adamw_torch_fused", "adamw_hf"),
    "local_rank": (0,),
    "hub_token": ("<HUB_TOKEN>",),
    "push_to_hub_token": ("<PUSH_TO_HUB_TOKEN>",),
    "eval_strategy": ("no", "none"),
    "max_grad_norm": (1,),
    "trackio_space_id": (None,),
    "include_num_input_tokens_seen": (False,),
}
OFF: tuple[Any, ...] = (None, False, "", 0, [], {})


def plain(value: Any) -> Any:
    """Return a value without its enum: "IntervalStrategy.STEPS" is "steps"."""
    if isinstance(value, str):
        kind, dot, member = value.partition(".")
        if dot and member.isupper() and kind.isidentifier():
            return member.lower()
    return getattr(value, "value", value)


class TrainerArguments:
    """Arguments by name. Reading one marks it as used; what nobody read is not carried over.

    Attributes:
        given: the arguments that were given.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = {name: plain(value) for name, value in given.items()}
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """Return the argument, or the Trainer's default; and mark it as used."""
        self._used.add(name)
        return self.peek(name)

    def peek(self, name: str) -> Any:
        """Return the argument, or the Trainer's default."""
        value = self.given.get(name)
        return DEFAULTS.get(name) if value is None else value

    def is_set(self, name: str) -> bool:
        """Return whether the argument was given, with another value than the default."""
        if name not in self.given:
            return False
        value, default = self.given[name], DEFAULTS.get(name)
        if value is None or value == default or value in _SAME.get(name, ()):
            return False
        return default is not None or value not in OFF

    def use(self, *names: str) -> None:
        """Mark arguments as used."""
        self._used.update(names)

    def unused(self) -> list[str]:
        """Return the names of the arguments that were set and not used."""
        return [name for name in self.given if self.is_set(name) and name not in self._used]

"""Checks of a transformers model against the options of a run, before its first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loopkit.errors import LoopkitWarning, OptionError, TaskError

_HALF = (torch.bfloat16, torch.float16)


def check_quantised(model: Any, has_adapters: bool) -> None:
    """Refuse to train a quantised model without adapters.

    Raises:
        TaskError: the weights of the model are quantised, and it has no adapters.
    """
    if has_adapters or not getattr(model, "is_quantized", False):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(quantizer, "is_trainable", False) and getattr(quantizer, "is_qat_trainable", False):
        return
    raise TaskError(
        f"the weights of {type(model).__name__} are quantised and cannot be trained: put adapters "
        "on it, as get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(...)), or "
        "load it without quantization_config"
    )


def check_precision(model: nn.Module, precision: str) -> None:
    """Report trained weights that have 16 bits although ``precision`` keeps them in 32.

    Raises:
        OptionError: the weights are float16 and the precision is "fp16", whose scaler needs float32.
    """
    if precision not in ("fp32", "tf32", "bf16", "fp16"):
        return
    half = {
        name: p.dtype
        for name, p in model.named_parameters()
        if p.requires_grad and p.dtype in _HALF
    }
    if not half:
        return
    name, dtype = next(iter(half.items()))
    kind = str(dtype).removeprefix("torch.")
    said = (
        f"{len(half)} trained weights of {type(model).__name__} are {kind} ({name} first), and "
        f'precision="{precision}" changes no weight'
    )
    remedy = (
        "load the model with dtype=torch.float32, or give "
        f'precision="{"bf16" if dtype == torch.bfloat16 else "fp16"}-true"'
    )
    if precision == "fp16" and torch.float16 in half.values():
        raise OptionError(f"{said}. The scaler of fp16 needs float32 weights: {remedy}")
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        warnings.warn(f"{said}: they are trained in {kind}. {remedy}", LoopkitWarning, stacklevel=2)


def generated(
    model: Any, batch: Mapping[str, Any], settings: Mapping[str, Any], labels: Sequence[str]
) -> Tensor:
    """Return the tokens that the model generates for ``batch``, with its labels left out.

    Ranks that hold parts of the model generate equally many tokens, since each token is a
    collective forward pass.
    """
    left_out = {*labels, "decoder_input_ids", "decoder_attention_mask"}
    inputs = {name: value for name, value in batch.items() if name not in left_out}
    if is_sharded(model):
        settings = {"synced_gpus": True, **settings}
    _gather_to_generate(model)
    tokens: Tensor = model.generate(**inputs, **settings)
    return tokens


def _gather_to_generate(model: nn.Module) -> None:
    """Let FSDP gather what a module holds itself when it generates, as when it is called.

    ``generate`` calls parts of a model, such as an encoder, of which the model may hold the weights.
    """
    if not dist.is_available():
        return
    from torch.distributed.fsdp import register_fsdp_forward_method

    for module in model.modules():
        if hasattr(module, "generate") and "generate" not in vars(module):
            register_fsdp_forward_method(module, "generate")


def is_sharded(model: nn.Module) -> bool:
    """Return whether several ranks hold parts of the model's parameters."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    from torch.distributed.tensor import DTensor

    # DeepSpeed marks the parameters that it divides by their number.
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())

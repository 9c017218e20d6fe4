"""The names of an HFTask's weights: the model's own, and of adapters those that peft gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.errors import TaskError


class Names:
    """How a task's ``state_dict`` calls the weights of its ``model``.

    A model's are all there, without the prefix that an attribute has. Of a model with adapters,
    what is frozen is
    left out: it does not change and is built anew. What is left are the adapters and whatever else
    is trained, and buffers, which a forward pass may change.

    Attributes:
        adapters: whether peft's adapters are on the model.
        complete: whether the adapters' names are such as peft opens.
        fingerprint: SHA-256 of everything that was frozen when the task was made; "" without
            adapters.
    """

    def __init__(self, task: Any, model: Any) -> None:
        self.adapters = hasattr(model, "peft_config")
        self.complete, self.fingerprint = True, ""
        self._peft: dict[str, str] = {}
        if self.adapters:
            self._peft, self.complete = _peft_names(model)
            state = model.state_dict()
            kept = self.saved(model, list(state))
            self.fingerprint = fingerprint(
                {name: value for name, value in state.items() if name not in kept}
            )
        task.register_state_dict_post_hook(_leave)
        task.register_load_state_dict_pre_hook(_enter)
        task.register_load_state_dict_post_hook(_excuse)

    def saved(self, model: nn.Module, names: list[str]) -> dict[str, str]:
        """Those of the model's ``names`` that are saved, and what they are called then."""
        if not self.adapters:
            return {name: name for name in names}
        moving = {
            name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
        }
        moving |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        return {
            name: self._peft.get(name, name)
            for name in names
            if name in moving or name in self._peft
        }


def _leave(task: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}model."
    held = {
        name[len(inner) :]: state.pop(name)
        for name in [name for name in state if name.startswith(inner)]
    }
    state.update(
        {
            prefix + own: held[name]
            for name, own in task._names.saved(task.model, list(held)).items()
        }
    )


def _enter(task: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    others = {name for name, _ in task.named_children()} - {"model"}
    saved = task._names.saved(task.model, list(task.model.state_dict(keep_vars=True)))
    full = {own: name for name, own in saved.items()}
    for name in [name for name in state if name.startswith(prefix)]:
        own = name[len(prefix) :]
        if own in full or own.partition(".")[0] not in others:
            state[f"{prefix}model.{full.get(own, own)}"] = state.pop(name)


def _excuse(task: Any, found: Any) -> None:
    """What is left out when saving is not missing when loading."""
    if task._names.adapters:
        saved = task._names.saved(task.model, list(task.model.state_dict(keep_vars=True)))
        found.missing_keys[:] = [
            name
            for name in found.missing_keys
            if not name.startswith("model.") or name[len("model.") :] in saved
        ]


def _peft_names(model: Any) -> tuple[dict[str, str], bool]:
    """The adapters' parameters by peft's names of them, and whether these are all that peft saves."""
    from peft import get_peft_model_state_dict

    own = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    state = model.state_dict(keep_vars=True)
    theirs = get_peft_model_state_dict(
        model, state, model.active_adapter, save_embedding_layers=False
    )
    names = {own[id(tensor)]: name for name, tensor in theirs.items() if id(tensor) in own}
    return names, len(names) == len(theirs)


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes and bytes.

    Raises:
        TaskError: a tensor has no values.
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise TaskError(
                f"{name} has no values, and adapters are told to belong to a model by its values: "
                "load the model before the adapters are put on it"
            )
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()

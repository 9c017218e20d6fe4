"""The names of an HFTask's weights: those of the model, or those that peft gives to adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.errors import TaskError


class StateDictNames:
    """Renames the weights in a task's ``state_dict`` to the names that ``from_pretrained`` expects.

    All weights of a plain model are saved, without the prefix ``model.``. Of a model with adapters
    the frozen weights are left out, because they do not change and the user builds them again. The
    adapters, everything else that is trained, and all buffers are saved.

    Attributes:
        adapters: whether the model has peft adapters.
        complete: whether peft can open the adapters under these names.
        fingerprint: the SHA-256 of all weights that were frozen when the task was made; ""
            without adapters.
    """

    def __init__(self, task: Any, model: Any) -> None:
        self.adapters = hasattr(model, "peft_config")
        self.complete = True
        self.fingerprint = ""
        self._peft: dict[str, str] = {}
        if self.adapters:
            self._peft, self.complete = _peft_names(model)
            state = model.state_dict()
            saved = self.saved(model, list(state))
            frozen = {name: value for name, value in state.items() if name not in saved}
            self.fingerprint = fingerprint(frozen)
        task.register_state_dict_post_hook(_rename_on_save)
        task.register_load_state_dict_pre_hook(_rename_on_load)
        task.register_load_state_dict_post_hook(_expect_unsaved)

    def saved(self, model: nn.Module, names: list[str]) -> dict[str, str]:
        """Return those of the model's ``names`` that are saved, with their name in the file."""
        if not self.adapters:
            return {name: name for name in names}
        changing = {
            name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
        }
        changing |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        return {
            name: self._peft.get(name, name)
            for name in names
            if name in changing or name in self._peft
        }


def _rename_on_save(task: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}model."
    names = [name for name in state if name.startswith(inner)]
    weights = {name[len(inner) :]: state.pop(name) for name in names}
    saved = task.state_dict_names.saved(task.model, list(weights))
    state.update({prefix + in_file: weights[name] for name, in_file in saved.items()})


def _rename_on_load(task: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    others = {name for name, _ in task.named_children()} - {"model"}
    names = {in_file: name for name, in_file in _all_saved(task).items()}
    for key in [key for key in state if key.startswith(prefix)]:
        in_file = key[len(prefix) :]
        if in_file in names or in_file.partition(".")[0] not in others:
            state[f"{prefix}model.{names.get(in_file, in_file)}"] = state.pop(key)


def _expect_unsaved(task: Any, found: Any) -> None:
    """Weights that are not saved are not missing when a state dict is loaded."""
    if task.state_dict_names.adapters:
        saved = _all_saved(task)
        found.missing_keys[:] = [
            name
            for name in found.missing_keys
            if not name.startswith("model.") or name[len("model.") :] in saved
        ]


def _all_saved(task: Any) -> dict[str, str]:
    names: dict[str, str] = task.state_dict_names.saved(
        task.model, list(task.model.state_dict(keep_vars=True))
    )
    return names


def _peft_names(model: Any) -> tuple[dict[str, str], bool]:
    """Return peft's names of the adapters' parameters, and whether peft saves no others."""
    from peft import get_peft_model_state_dict

    state = model.state_dict(keep_vars=True)
    own = {id(tensor): name for name, tensor in state.items()}
    theirs = get_peft_model_state_dict(
        model, state, model.active_adapter, save_embedding_layers=False
    )
    names = {own[id(tensor)]: name for name, tensor in theirs.items() if id(tensor) in own}
    return names, len(names) == len(theirs)


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the names, shapes and bytes of tensors.

    Raises:
        TaskError: a tensor is on the meta device.
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise TaskError(
                f"{name} has no values, and a checkpoint of adapters identifies its model by the "
                "values: load the model before the adapters are put on it"
            )
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()

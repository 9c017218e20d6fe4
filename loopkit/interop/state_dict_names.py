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
        adapter_names: the active adapters. With several, the weights of each have its name as a
            folder, as in "first/base_model.model…": an export writes a folder for each.
        complete: whether peft can open the adapters under these names.
        fingerprint: the SHA-256 of all weights that were frozen when the task was made; ""
            without adapters.
    """

    def __init__(self, task: Any, model: Any) -> None:
        self.adapters = hasattr(model, "peft_config")
        self.adapter_names = active_adapters(model)
        self.complete = True
        self.fingerprint = ""
        self._peft: dict[str, str] = {}
        self._aliases: set[str] = set()
        if self.adapters:
            self._peft, self._aliases, self.complete = _peft_names(model, self.adapter_names)
            state = model.state_dict()
            saved = self.saved(model, list(state))
            trained = {*saved, *self._aliases}
            frozen = {name: value for name, value in state.items() if name not in trained}
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
            if (name in changing and name not in self._aliases) or name in self._peft
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


def active_adapters(model: Any) -> list[str]:
    """Return the names of a model's active adapters, put on it by peft or by ``add_adapter``."""
    if not hasattr(model, "peft_config"):
        return []
    found = model.active_adapters
    return list(found() if callable(found) else found)


def _peft_names(model: Any, adapters: list[str]) -> tuple[dict[str, str], set[str], bool]:
    """Return the names that peft gives to the adapters' weights.

    Returns:
        Its names by the model's own; other names of the same tensors, which are tied weights; and
        whether peft saves no tensors but these, each under one name.
    """
    from peft import get_peft_model_state_dict

    state = model.state_dict(keep_vars=True)
    own: dict[int, list[str]] = {}
    for name, tensor in state.items():
        own.setdefault(id(tensor), []).append(name)
    # transformers adds the prefix when it saves the adapters of its own add_adapter.
    prefix = "" if hasattr(model, "get_base_model") else "base_model.model."
    names: dict[str, str] = {}
    aliases: set[str] = set()
    complete = True
    for adapter in adapters:
        folder = f"{adapter}/" if len(adapters) > 1 else ""
        theirs = get_peft_model_state_dict(model, state, adapter, save_embedding_layers=False)
        for theirs_name, tensor in theirs.items():
            found = own.get(id(tensor), [])
            if not found or found[0] in names or found[0] in aliases:
                complete = False
                continue
            same = [n for n in found if n.replace(f".{adapter}", "") == theirs_name]
            chosen = (same or found[-1:])[0]
            names[chosen] = folder + prefix + theirs_name
            aliases |= {*found} - {chosen}
    return names, aliases, complete


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

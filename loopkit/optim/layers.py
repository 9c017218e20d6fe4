"""The layers of a model by the names of its parameters: embeddings, each block, the head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from loopkit.errors import OptionError
from loopkit.task import name_of

_HEAD = re.compile(r"(^|\.)(\w*_)?(head|classifier)(\.|$)")
_EMBEDDING = re.compile(r"(^|\.)\w*emb(ed|s?(\.|$))")


def layer_levels(task: nn.Module) -> dict[str, int]:
    """Return the level of every parameter by its name; 0 is the lowest.

    Each position of a ModuleList or Sequential is a block, and a level. Blocks count in the order
    of their registration, through all stacks, such as an encoder and a decoder. Level 0 holds
    embeddings outside of blocks and what is registered before the first block. The highest level
    holds a module called head or classifier. A parameter between two stacks has the level of the
    block before it.

    Raises:
        OptionError: the task has no ModuleList or Sequential of blocks.
    """
    stacks = [f"{prefix}." for prefix in _stacks(task, "")]
    if not stacks:
        raise OptionError(
            f"layer_decay: {name_of(task)} has no ModuleList or Sequential to tell its layers by; "
            "give each part its rate with groups=[ParamGroup(match=..., lr=...)]"
        )
    embeddings = _embedding_weights(task)
    top = 2 * sum(1 for _ in task.parameters())
    blocks: dict[str, int] = {}
    raw: dict[str, int] = {}
    for name, parameter in task.named_parameters():
        stack = next((stack for stack in stacks if name.startswith(stack)), None)
        if stack is not None:
            block = stack + name[len(stack) :].split(".")[0]
            raw[name] = blocks.setdefault(block, len(blocks) + 1)
        elif id(parameter) in embeddings or _EMBEDDING.search(name):
            raw[name] = 0
        elif _HEAD.search(name) or (blocks and not _is_before_stacks(task, stacks, name)):
            raw[name] = top
        else:
            raw[name] = len(blocks)
    numbers = {level: number for number, level in enumerate(sorted(set(raw.values())))}
    return {name: numbers[level] for name, level in raw.items()}


def hidden_matrices(task: nn.Module, among: Iterable[str] | None = None) -> set[str]:
    """Return the names of the two-dimensional weights between the embeddings and the head.

    The head is a module called head or classifier, or one that shares its weight with an embedding.
    Without either, it is the last matrix.

    Args:
        task: the model.
        among: the names of the parameters to choose from; None for all.
    """
    embeddings = _embedding_weights(task)
    candidates = None if among is None else set(among)
    matrices = [
        (name, parameter)
        for name, parameter in task.named_parameters()
        if dimensions(parameter) == 2 and (candidates is None or name in candidates)
    ]
    between = [n for n, p in matrices if id(p) not in embeddings and not _EMBEDDING.search(n)]
    uses = [n for n, p in task.named_parameters(remove_duplicate=False) if id(p) in embeddings]
    tied = len(uses) > len(embeddings)
    hidden = [name for name in between if not _HEAD.search(name)]
    if len(hidden) == len(between) and not tied:
        hidden = hidden[:-1]
    return set(hidden)


def _stacks(module: nn.Module, prefix: str) -> Iterator[str]:
    """Yield the names of the outermost containers of blocks."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if _is_stack(child) and not _HEAD.search(full):
            yield full
        else:
            yield from _stacks(child, f"{full}.")


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return True
    if not isinstance(module, nn.Sequential):
        return False
    parts = [part for part in module if next(part.parameters(), None) is not None]
    # Sequential(embedding, blocks, head) holds a stack and is none itself.
    same_kind = len({type(part) for part in parts}) == 1
    return len(parts) > 1 and (same_kind or next(_stacks(module, ""), None) is None)


def _is_before_stacks(task: nn.Module, stacks: list[str], name: str) -> bool:
    """Return whether parameters of a stack come after the parameter ``name``."""
    names = [n for n, _ in task.named_parameters()]
    return any(n.startswith(tuple(stacks)) for n in names[names.index(name) :])


def _embedding_weights(task: nn.Module) -> set[int]:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(module.weight) for module in task.modules() if isinstance(module, kinds)}


def dimensions(parameter: nn.Parameter) -> int:
    """Return the number of dimensions of a parameter.

    Under ZeRO 3 the parameter itself is flat; DeepSpeed keeps its shape in ``ds_shape``.
    """
    return len(getattr(parameter, "ds_shape", parameter.shape))

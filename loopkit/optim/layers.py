"""A model read as layers, by the names of its parameters: embeddings lowest, then each block, the
head highest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from loopkit.errors import OptionError
from loopkit.task import name_of

_HEAD = re.compile(r"(^|\.)(\w*_)?(head|classifier)(\.|$)")
_EMBEDDING = re.compile(r"(^|\.)\w*emb(ed|s?(\.|$))")


def layer_levels(task: nn.Module) -> dict[str, int]:
    """The level of every parameter: 0 for what comes before the blocks, the highest for the head.

    Blocks are the positions of ModuleLists and Sequentials, in the order in which they are
    registered, through all stacks (an encoder's, then a decoder's). Embeddings outside a block are
    at level 0, a module called head or classifier is at the highest, wherever they are registered.
    What stands between two stacks shares the level of the block before it.

    Raises:
        OptionError: there is no ModuleList or Sequential to tell layers by.
    """
    stacks = [f"{prefix}." for prefix in _stacks(task, "")]
    if not stacks:
        raise OptionError(
            f"layer_decay: {name_of(task)} has no ModuleList or Sequential to tell its layers by; "
            "give each part its rate with groups=[Group(match=..., lr=...)]"
        )
    embeddings, top = _embedding_weights(task), 2 * sum(1 for _ in task.parameters())
    blocks: dict[str, int] = {}
    raw: dict[str, int] = {}
    for name, parameter in task.named_parameters():
        stack = next((stack for stack in stacks if name.startswith(stack)), None)
        if stack is not None:
            block = stack + name[len(stack) :].split(".")[0]
            raw[name] = blocks.setdefault(block, len(blocks) + 1)
        elif id(parameter) in embeddings or _EMBEDDING.search(name):
            raw[name] = 0
        elif _HEAD.search(name) or (blocks and not _ahead(task, stacks, name)):
            raw[name] = top
        else:
            raw[name] = len(blocks)
    order = {level: number for number, level in enumerate(sorted(set(raw.values())))}
    return {name: order[level] for name, level in raw.items()}


def hidden_matrices(task: nn.Module, among: Iterable[str] | None = None) -> set[str]:
    """Names of the two-dimensional weights between embeddings and head, of all parameters or of
    those ``among``.

    The head is what is called head or classifier, or shares its weight with an embedding; without
    either, the last matrix.
    """
    embeddings = _embedding_weights(task)
    looked_at = None if among is None else set(among)
    names = [
        (n, p)
        for n, p in task.named_parameters()
        if dimensions(p) == 2 and (looked_at is None or n in looked_at)
    ]
    between = [n for n, p in names if id(p) not in embeddings and not _EMBEDDING.search(n)]
    uses = [n for n, p in task.named_parameters(remove_duplicate=False) if id(p) in embeddings]
    tied = len(uses) > len(embeddings)
    hidden = [n for n in between if not _HEAD.search(n)]
    if len(hidden) == len(between) and not tied:
        hidden = hidden[:-1]
    return set(hidden)


def _stacks(module: nn.Module, prefix: str) -> Iterator[str]:
    """Names of the outermost containers whose positions are layers."""
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
    # Sequential(embedding, blocks, head) is a wrapping of layers, not a row of them.
    alike = len({type(part) for part in parts}) == 1
    return len(parts) > 1 and (alike or next(_stacks(module, ""), None) is None)


def _ahead(task: nn.Module, stacks: list[str], name: str) -> bool:
    """Whether parameters of a stack come after the parameter ``name``."""
    names = [n for n, _ in task.named_parameters()]
    return any(n.startswith(tuple(stacks)) for n in names[names.index(name) :])


def _embedding_weights(task: nn.Module) -> set[int]:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(module.weight) for module in task.modules() if isinstance(module, kinds)}


def dimensions(parameter: nn.Parameter) -> int:
    """How many dimensions a parameter has; one that DeepSpeed made in parts looks as if it had one."""
    return len(getattr(parameter, "ds_shape", parameter.shape))

"""Which modules FSDP gathers by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from loopkit.errors import OptionError
from loopkit.strategies.activation_checkpointing import repeated_blocks

Wrap = Literal["auto"] | int | Sequence[str | type]


def blocks_to_shard(task: nn.Module, wrap: Wrap) -> list[nn.Module]:
    """Return the modules to shard by themselves, inner ones first, as fully_shard wants them.

    Raises:
        OptionError: ``wrap`` names a class that no module is of.
    """
    modules = [module for module in task.modules() if module is not task]
    if wrap == "auto":
        found = [block for block in repeated_blocks(task) if block is not task]
    elif isinstance(wrap, int):
        found = [m for m in modules if sum(p.numel() for p in m.parameters()) >= wrap]
    else:
        named = [kind if isinstance(kind, str) else kind.__name__ for kind in wrap]
        present = {type(module).__name__ for module in modules}
        missing = [kind for kind in named if kind not in present]
        if missing:
            raise OptionError(
                f"FSDP(wrap=...): no module is of class {missing[0]!r}; there are "
                f"{', '.join(sorted(present))}"
            )
        found = [module for module in modules if type(module).__name__ in named]
    # A list or dict of modules has no forward pass that could gather parameters.
    wanted = {id(m) for m in found if not isinstance(m, (nn.ModuleList, nn.ModuleDict))}
    return _without_shared(task, [m for m in _inner_first(task) if id(m) in wanted])


def _inner_first(module: nn.Module, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """Yield a module and those in it once each: inner ones first, and the last children first."""
    seen = set() if seen is None else seen
    for child in reversed(list(module.children())):
        if id(child) not in seen:
            yield from _inner_first(child, seen)
    seen.add(id(module))
    yield module


def _without_shared(task: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return ``blocks`` without those that share a parameter with a module outside of them.

    One gather must serve all modules of a parameter. It becomes that of the smallest block that
    contains them all, or of the task.
    """
    kept = list(blocks)
    while True:
        owners: dict[int, set[int]] = {}
        _add_owners(task, task, {id(block) for block in kept}, owners)
        inside = {id(block): {id(m) for m in block.modules()} for block in [*kept, task]}
        shared = {
            owner for of_one in owners.values() for owner in of_one if not of_one <= inside[owner]
        }
        if not shared:
            return kept
        kept = [block for block in kept if id(block) not in shared]


def _add_owners(
    module: nn.Module, owner: nn.Module, blocks: set[int], owners: dict[int, set[int]]
) -> None:
    """Note for each parameter in ``module`` the innermost blocks that it is in."""
    owner = module if id(module) in blocks else owner
    for parameter in module.parameters(recurse=False):
        owners.setdefault(id(parameter), set()).add(id(owner))
    for child in module.children():
        _add_owners(child, owner, blocks, owners)


def set_prefetch(blocks: Sequence[Any], count: int) -> None:
    """Have each block gather the parameters of the ``count`` next ones, forward and backward.

    Args:
        blocks: the blocks, last ones first.
        count: how many.
    """
    in_forward_order = blocks[::-1]
    for number, block in enumerate(in_forward_order):
        following = in_forward_order[number + 1 : number + 1 + count]
        preceding = in_forward_order[max(0, number - count) : number]
        block.set_modules_to_forward_prefetch(following)
        block.set_modules_to_backward_prefetch(preceding[::-1])

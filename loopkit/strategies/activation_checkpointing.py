"""Activation memory: modules that compute their activations again in the backward pass, or keep
them on the host.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from loopkit.errors import OptionError

FORMS = "'full', 'every:2', 'select:<regular expression>', 'class:<name>', 'offload', or two joined by '+'"


def parse_activation_checkpointing(
    activation_checkpointing: str | None,
) -> tuple[tuple[str, str], bool]:
    """What to compute again, as (way, argument), and whether saved activations move to the CPU.

    Raises:
        OptionError: it has none of the accepted forms.
    """
    way, argument, offload = "", "", False
    for part in (activation_checkpointing or "").split("+") if activation_checkpointing else []:
        name, _, rest = part.strip().partition(":")
        if name == "offload" and not rest:
            offload = True
        elif (
            way
            or (name == "full") != (not rest)
            or name not in ("full", "every", "select", "class")
        ):
            raise OptionError(
                f"activation_checkpointing={activation_checkpointing!r} is not known: give {FORMS}"
            )
        else:
            way, argument = name, rest
    if way == "every" and not (argument.isdigit() and int(argument)):
        raise OptionError(
            f"activation_checkpointing={activation_checkpointing!r}: give a whole number of at least 1 after 'every:'"
        )
    if way == "select":
        try:
            re.compile(argument)
        except re.error as error:
            raise OptionError(
                f"activation_checkpointing={activation_checkpointing!r}: {argument!r} is no regular expression: {error}"
            ) from error
    return (way, argument), offload


def apply_activation_checkpointing(
    task: nn.Module, activation_checkpointing: str | None
) -> list[str]:
    """Have the chosen modules drop their activations and compute them again when they are needed.

    The results are the same bit for bit, dropout included; it costs about one more forward pass of
    those modules. Parameter names stay as they are. A module with a
    ``gradient_checkpointing_enable`` of its own, as transformers' models have, is asked to do it
    itself under "full". A later call replaces the choice.

    Returns:
        The names of the chosen modules.

    Raises:
        OptionError: nothing matches.
    """
    from torch.distributed._composable import checkpoint  # type: ignore[attr-defined] # works by hooks, for one device as for many

    (way, argument), _ = parse_activation_checkpointing(activation_checkpointing)
    modules = {name: module for name, module in task.named_modules() if name}
    for module in modules.values():
        if checkpoint.state(module) is not None:
            checkpoint.state(module).enable_hook = False
    if not way:
        return []
    chosen = _choose(task, modules, way, argument)
    if not chosen:
        known = ", ".join(list(modules)[:12])
        raise OptionError(
            f"activation_checkpointing={activation_checkpointing!r} picks no module of "
            f"{type(task).__name__}, which has: {known}"
        )
    for name, module in chosen.items():
        own = _own(module)
        if own:
            getattr(module, f"{own}_checkpointing_enable")(
                **{f"{own}_checkpointing_kwargs": {"use_reentrant": False}}
            )
        elif checkpoint.state(modules[name]) is None:
            checkpoint(module)
        else:
            checkpoint.state(module).enable_hook = True
    return list(chosen)


def _choose(
    task: nn.Module, modules: Mapping[str, nn.Module], way: str, argument: str
) -> dict[str, nn.Module]:
    if way == "select":
        found = {name: m for name, m in modules.items() if re.search(argument, name)}
    elif way == "class":
        found = {name: m for name, m in modules.items() if type(m).__name__ == argument}
    else:
        own = {name: m for name, m in modules.items() if _own(m)}
        if way == "full" and own:
            return own
        blocks = {id(block) for block in repeated_blocks(task)}
        found = {name: m for name, m in modules.items() if id(m) in blocks}
        if way == "every":
            found = {name: m for i, (name, m) in enumerate(found.items()) if i % int(argument) == 0}
    # A module inside a chosen one is computed again with it.
    inner = {n for n in found for outer in found if n.startswith(f"{outer}.")}
    return {name: module for name, module in found.items() if name not in inner}


def _own(module: nn.Module) -> str:
    """What a module's checkpointing of its own is called: as in transformers since 5.24, or before;
    "" for none.
    """
    names = ("activation", "gradient")
    return next(
        (name for name in names if callable(getattr(module, f"{name}_checkpointing_enable", None))),
        "",
    )


def repeated_blocks(task: nn.Module) -> Iterable[nn.Module]:
    """A task's blocks: the members of a class that stands more than once in a ModuleList or
    Sequential.

    Of torch's own classes only where a list holds nothing else; a task without any has its children
    for blocks.
    """
    blocks: list[nn.Module] = []
    for module in task.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds = Counter(type(block) for block in module)
            repeated = {
                k
                for k, count in kinds.items()
                if count > 1 and (len(kinds) == 1 or not _is_torchs(k))
            }
            blocks += [block for block in module if type(block) in repeated]
    return blocks or list(task.children())


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn")

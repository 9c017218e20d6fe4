"""Activation checkpointing: modules compute activations again in the backward pass, to save memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from loopkit.errors import OptionError

FORMS = "'full', 'every:2', 'select:<regular expression>', 'class:<name>', 'offload', or two joined by '+'"
_KINDS = ("full", "every", "select", "class")


def parse_activation_checkpointing(option: str | None) -> tuple[tuple[str, str], bool]:
    """Return what the option chooses.

    Returns:
        The kind of choice of modules and its argument, which are empty for no modules; and whether
        saved activations move to the CPU.

    Raises:
        OptionError: the option has none of the accepted forms.
    """
    kind, argument = "", ""
    offload = False
    for part in option.split("+") if option else []:
        name, _, rest = part.strip().partition(":")
        if name == "offload" and not rest:
            offload = True
        elif kind or name not in _KINDS or (name == "full") == bool(rest):
            raise OptionError(f"activation_checkpointing={option!r} is not known: give {FORMS}")
        else:
            kind, argument = name, rest
    if kind == "every" and not (argument.isdigit() and int(argument)):
        raise OptionError(
            f"activation_checkpointing={option!r}: give a whole number of at least 1 after 'every:'"
        )
    if kind == "select":
        try:
            re.compile(argument)
        except re.error as error:
            raise OptionError(
                f"activation_checkpointing={option!r}: {argument!r} is no regular expression: "
                f"{error}"
            ) from error
    return (kind, argument), offload


def apply_activation_checkpointing(task: nn.Module, option: str | None) -> list[str]:
    """Have the chosen modules drop their activations and compute them again when needed.

    The results are the same bit for bit, dropout included. It costs about one more forward pass of
    these modules. Parameter names stay as they are. Under "full" a module with a method
    ``gradient_checkpointing_enable``, as transformers' models have, does it itself. A later call
    replaces the choice.

    Returns:
        The names of the chosen modules.

    Raises:
        OptionError: the option chooses no module.
    """
    # It works by hooks on the modules, on one device and on many.
    from torch.distributed._composable import checkpoint  # type: ignore[attr-defined]

    (kind, argument), _ = parse_activation_checkpointing(option)
    modules = {name: module for name, module in task.named_modules() if name}
    for module in modules.values():
        if checkpoint.state(module) is not None:
            checkpoint.state(module).enable_hook = False
    if not kind:
        return []
    chosen = _choose(task, modules, kind, argument)
    if not chosen:
        known = ", ".join(list(modules)[:12])
        raise OptionError(
            f"activation_checkpointing={option!r} picks no module of {type(task).__name__}, which "
            f"has: {known}"
        )
    for name, module in chosen.items():
        own = _own_checkpointing(module)
        if own:
            enable = getattr(module, f"{own}_checkpointing_enable")
            enable(**{f"{own}_checkpointing_kwargs": {"use_reentrant": False}})
        elif checkpoint.state(modules[name]) is None:
            checkpoint(module)
        else:
            checkpoint.state(module).enable_hook = True
    return list(chosen)


def _choose(
    task: nn.Module, modules: Mapping[str, nn.Module], kind: str, argument: str
) -> dict[str, nn.Module]:
    if kind == "select":
        found = {name: m for name, m in modules.items() if re.search(argument, name)}
    elif kind == "class":
        found = {name: m for name, m in modules.items() if type(m).__name__ == argument}
    else:
        own = {name: m for name, m in modules.items() if _own_checkpointing(m)}
        if kind == "full" and own:
            return own
        blocks = {id(block) for block in repeated_blocks(task)}
        found = {name: m for name, m in modules.items() if id(m) in blocks}
        if kind == "every":
            found = {name: m for i, (name, m) in enumerate(found.items()) if i % int(argument) == 0}
    # A module inside a chosen one is computed again with it.
    inner = {n for n in found for outer in found if n.startswith(f"{outer}.")}
    return {name: module for name, module in found.items() if name not in inner}


def _own_checkpointing(module: nn.Module) -> str:
    """Return the first word of the method by which a module does it itself; "" if it has none.

    The method is ``activation_checkpointing_enable`` in transformers since 5.24, and
    ``gradient_checkpointing_enable`` before.
    """
    for word in ("activation", "gradient"):
        if callable(getattr(module, f"{word}_checkpointing_enable", None)):
            return word
    return ""


def repeated_blocks(task: nn.Module) -> Iterable[nn.Module]:
    """Return a task's blocks: modules of a class that a ModuleList or Sequential repeats.

    torch's own classes count only where a list holds nothing else. If nothing is repeated, the
    task's children are its blocks.
    """
    blocks: list[nn.Module] = []
    for module in task.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            counts = Counter(type(block) for block in module)
            repeated = {
                kind
                for kind, count in counts.items()
                if count > 1 and (len(counts) == 1 or not _is_of_torch(kind))
            }
            blocks += [block for block in module if type(block) in repeated]
    return blocks or list(task.children())


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn")

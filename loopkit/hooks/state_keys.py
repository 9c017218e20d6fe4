"""The names under which a checkpoint holds the state of each hook: "EMA", "EMA-2", ..."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loopkit.errors import CheckpointError
from loopkit.events import Hook


def state_keys(hooks: Iterable[Hook]) -> dict[str, Hook]:
    """Return the hooks of a run by the key of their state: class name, and number from the second.

    Saving, resuming and reading a hook's state from a checkpoint all use these keys.
    """
    keys: dict[str, Hook] = {}
    counts: dict[str, int] = {}
    for hook in hooks:
        name = type(hook).__name__
        counts[name] = counts.get(name, 0) + 1
        keys[name if counts[name] == 1 else f"{name}-{counts[name]}"] = hook
    return keys


def distinct_key(hook: Hook, hooks: Iterable[Hook]) -> str | None:
    """Return the key of ``hook`` among the hooks of its run; None if no other has its class name."""
    same_class = _of_class(type(hook).__name__, state_keys(hooks))
    own = [key for key, other in same_class.items() if other is hook]
    return own[0] if own and len(same_class) > 1 else None


def find_state(states: Mapping[str, Any], hook: Hook, key: str | None, source: object) -> Any:
    """Return the state of a hook among those that a checkpoint holds.

    Args:
        states: by key, as the checkpoint holds them.
        hook: the hook that the state is for.
        key: the key that the user chose, or the one from :func:`distinct_key`. None if the
            checkpoint must hold exactly one state of the hook's class.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: there is no such state, or several; the message lists them.
    """
    name = type(hook).__name__
    found = _of_class(name, states)
    if key is not None and key in states:
        return states[key]
    if key is None and len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise CheckpointError(f"{source} holds no state of a hook {key or name}")
    problem = f"no state of a hook {key}" if key else f"the states of {len(found)} {name} hooks"
    raise CheckpointError(
        f"{source} holds {problem}: there is {' and '.join(found)}. "
        f"Choose one with name=, as name={list(found)[-1]!r}"
    )


def _of_class(name: str, states: Mapping[str, Any]) -> dict[str, Any]:
    """Return those states whose key was made from a class name."""
    key = re.compile(rf"{re.escape(name)}(-\d+)?")
    return {each: state for each, state in states.items() if key.fullmatch(each)}

"""Calls that rank 0 alone makes while the other ranks wait for what came of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from loopkit import errors
from loopkit.distributed.rank_zero import shared_store

_calls: Counter[str] = Counter()


def once(key: str, function: Callable[[], str], timeout: timedelta) -> str:
    """Return what ``function`` returns on rank 0, or raise on every rank what it raises there.

    Rank 0 waits for no other rank, so it may also be the only one that calls. Without a default
    process group of several ranks, the function is called here.

    Args:
        key: the name of the call. The n-th call of a name on one rank meets the n-th on rank 0.
        timeout: how long another rank waits for rank 0.

    Raises:
        HungError: rank 0 did not make the call in that time, or its process has ended.
        LoopkitError: the function failed on rank 0 with an error that is not loopkit's.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return function()
    store = shared_store("once", timeout.total_seconds())
    _calls[key] += 1
    name = f"{key}/{_calls[key]}"
    if dist.get_rank() == 0:
        try:
            returned = function()
        except Exception as error:
            store.set(name, json.dumps({"error": type(error).__name__, "message": str(error)}))
            raise
        store.set(name, json.dumps({"returned": returned}))
        return returned
    try:
        store.wait([name], timeout)
        outcome = json.loads(store.get(name))
    except RuntimeError as error:
        raise errors.HungError(
            f"rank {dist.get_rank()} waited for rank 0 to do {key}, which did not do it within "
            f"{timeout}, or has ended: call it on rank 0 too, or on rank 0 alone"
        ) from error
    if "error" in outcome:
        raise _rebuilt(key, outcome["error"], outcome["message"])
    return str(outcome["returned"])


def _rebuilt(key: str, name: str, message: str) -> errors.LoopkitError:
    """Return rank 0's error, if its class is one of loopkit's, or a LoopkitError that quotes it."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.LoopkitError):
        return kind(message)
    return errors.LoopkitError(f"{key} failed on rank 0: {name}: {message}")

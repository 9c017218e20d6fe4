"""Calls that rank 0 alone makes while the other ranks wait for what came of it."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from loopkit.errors import HungError

T = TypeVar("T")
_calls: Counter[str] = Counter()


def once(key: str, function: Callable[[], T], timeout: timedelta) -> T:
    """Return what ``function`` returns on rank 0, or raise on every rank what it raises there.

    Rank 0 waits for no other rank, so it may also be the only one that calls. The ranks are told
    apart by the default process group; without one, the function is called here.

    Args:
        key: the name of the call. The n-th call of a name on one rank meets the n-th on rank 0.
        function: returns a value, or raises an exception, that can be pickled.
        timeout: how long another rank waits for rank 0.

    Raises:
        HungError: rank 0 did not make the call in that time.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return function()
    store: Any = dist.distributed_c10d._get_default_store()
    _calls[key] += 1
    name = f"loopkit/once/{key}/{_calls[key]}"
    if dist.get_rank():
        try:
            store.wait([name], timeout)
        except RuntimeError as error:
            raise HungError(
                f"rank {dist.get_rank()} waited {timeout} for rank 0 to do {key}: call it on rank "
                "0 too, or on rank 0 alone"
            ) from error
        value, failure = pickle.loads(store.get(name))
    else:
        value, failure = _outcome(function)
        store.set(name, pickle.dumps((value, failure)))
    if failure is not None:
        raise failure
    return value  # type: ignore[no-any-return]


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error

"""What rank 0 does alone or before the others, within a run and outside of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from loopkit.checks import checked_number
from loopkit.distributed.environment import find_rank_info, is_rank_zero
from loopkit.distributed.process_group import rank_store
from loopkit.errors import HungError, LoopkitError

Result = TypeVar("Result")
_READ_TIMEOUT = 20.0


def rank_zero_only(function: Callable[..., Result]) -> Callable[..., Result | None]:
    """Decorate a function so that rank 0 alone runs it; on the others it returns None.

    It must not call a collective, for which rank 0 would wait.
    """

    @wraps(function)
    def on_rank_zero(*arguments: Any, **keywords: Any) -> Result | None:
        return function(*arguments, **keywords) if _rank() == 0 else None

    return on_rank_zero


@contextmanager
def rank_zero_first(*, local: bool = False, timeout: float = 3600.0) -> Iterator[None]:
    """Run a block on rank 0 first, and on the others when rank 0 has left it.

    Use it for what only one process may prepare, such as a download: the others find it done. Every
    rank must come to the block, anywhere in the script or in the task. A process that runs alone
    does not wait.

    Example::

        with rank_zero_first():
            data = datasets.load_dataset("imdb")

    Args:
        local: let local rank 0 of each machine start, for a disk that the machines do not
            share.
        timeout: seconds that the others wait.

    Raises:
        LoopkitError: rank 0 has failed in the block.
        HungError: rank 0 has not left it within ``timeout``.
    """
    checked_number(timeout, "rank_zero_first(timeout=)", above=0, what="seconds")
    info, rank = find_rank_info(), _rank()
    alone = dist.get_world_size() == 1 if dist.is_initialized() else info is None or info.size == 1
    if alone:
        yield
        return
    first = info.rank - info.local_rank if local and info is not None else 0
    store = shared_store("rank_zero_first", timeout)
    # The same call has the same number on each rank.
    number = store.add(f"calls/{first}/{rank}", 1)
    key = f"done/{first}/{number}"
    if rank == first:
        try:
            yield
        except BaseException:
            store.set(key, "failed")
            # The store may end with this process: the others read the failure before.
            with suppress(RuntimeError):
                store.wait([f"{key}/read"], timedelta(seconds=_READ_TIMEOUT))
            raise
        store.set(key, "done")
        return
    _wait(store, key, first, timeout)
    yield


def _wait(store: Any, key: str, first: int, timeout: float) -> None:
    """Wait until rank ``first`` has set ``key``."""
    failed = f"rank {first} has failed in rank_zero_first(); see its error"
    try:
        store.wait([key], timedelta(seconds=timeout))
        if store.get(key) == b"failed":
            store.set(f"{key}/read", "")
            raise LoopkitError(failed)
    except dist.DistNetworkError as error:
        # The process that held the store has ended.
        raise LoopkitError(failed) from error
    except dist.DistStoreError as error:
        raise HungError(
            f"rank {first} has not left rank_zero_first() within {timeout:g} s. If it needs longer, "
            "pass timeout="
        ) from error


def _rank() -> int:
    if dist.is_initialized():
        return dist.get_rank()
    info = find_rank_info()
    return info.rank if info is not None else int(not is_rank_zero())


def shared_store(name: str, timeout: float) -> Any:
    """Return the store of all ranks, where keys begin with ``name``.

    Args:
        timeout: seconds to wait for the store, and for a key in it.
    """
    info = find_rank_info()
    if info is not None:
        return PrefixStore(name, rank_store(info, timedelta(seconds=timeout)))
    # The script has made the process group without a launcher's environment.
    return PrefixStore(name, dist.distributed_c10d._get_default_store())

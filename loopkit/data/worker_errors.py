"""Errors of worker processes that died or hang, which torch tells in several ways."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from loopkit.errors import LoopkitError


def is_worker_failure(error: BaseException) -> bool:
    """Return whether an error of a DataLoader's iterator says that a worker is gone, or is late.

    A worker that is killed closes its connections. Which error comes first is a matter of chance.
    """
    if isinstance(error, (ConnectionError, EOFError)):
        return True
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, LoopkitError)
        and ("worker" in text or "DataLoader timed out" in text)
    )


def end_workers(loader: Any, iterator: Any) -> None:
    """End the workers of a DataLoader's iterator after an error.

    While torch watches them, the signal of a worker's death can raise a second error anywhere in
    this process, some time after the first. And the error's traceback keeps the iterator: Python's
    garbage collector would end its queues first, and each worker would then wait for 5 seconds.

    Args:
        loader: the DataLoader, which starts new workers the next time.
        iterator: its iterator, or another one, which has no workers.
    """
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        with suppress(RuntimeError, OSError):
            shutdown()
        loader._iterator = None

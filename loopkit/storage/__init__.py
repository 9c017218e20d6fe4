"""Runs in object storage: mirrored from this machine by a thread, fetched again for a resume"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.lazy import lazy_names

if TYPE_CHECKING:
    from loopkit.storage.checkpoints import Kept, RemoteCheckpoints
    from loopkit.storage.copies import (
        checkpoints_at,
        fetch_checkpoint,
        fetched,
        open_remote,
        outlined,
        remote_problems,
    )
    from loopkit.storage.local_copy import FETCHED, local_copy_of, remove_fetched
    from loopkit.storage.run_storage import AUTO, RunStorage
    from loopkit.storage.urls import as_place, as_url, check_url, place_of

_HOMES = {
    "checkpoints": ("Kept", "RemoteCheckpoints"),
    "copies": (
        "checkpoints_at",
        "fetch_checkpoint",
        "fetched",
        "open_remote",
        "outlined",
        "remote_problems",
    ),
    "local_copy": ("FETCHED", "local_copy_of", "remove_fetched"),
    "run_storage": ("AUTO", "RunStorage"),
    "urls": ("as_place", "as_url", "check_url", "place_of"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AUTO", "FETCHED", "Kept", "RemoteCheckpoints", "RunStorage", "as_place", "as_url", "check_url",
    "checkpoints_at", "fetch_checkpoint", "fetched", "local_copy_of", "open_remote", "outlined",
    "place_of", "remote_problems", "remove_fetched",
]  # fmt: skip

# A run in a directory needs nothing of this.
__getattr__, __dir__ = lazy_names("loopkit.storage", _HOME_OF)

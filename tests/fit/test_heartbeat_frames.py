"""A heartbeat tells where the main thread is, and keeps nothing of it."""

from __future__ import annotations

import atexit
import weakref
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from loopkit.distributed import heartbeat
from loopkit.distributed.environment import RankInfo


class Held:
    """Stands for what a frame names, such as a process group."""


@pytest.fixture
def store(monkeypatch):
    """A store, to which a heartbeat reports a few times a second."""
    monkeypatch.setattr(heartbeat, "_INTERVAL", 0.3)
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    beats = heartbeat.Heartbeat(RankInfo(0, 1, 0, 1, "127.0.0.1", store.port))
    yield store
    beats.stop()
    atexit.unregister(beats.stop)


def is_kept(store: TCPStore) -> bool:
    """Return whether what a function has named is alive after it, if a heartbeat saw it inside."""

    def named() -> weakref.ref[Held]:
        held, before = Held(), store.get("loopkit/heartbeat/0/0")
        while store.get("loopkit/heartbeat/0/0") == before:
            pass
        return weakref.ref(held)

    return named()() is not None


def test_what_the_main_thread_has_left_is_not_kept_until_the_next_heartbeat(store):
    # One look may meet the moment in which the heartbeat reads the frame.
    assert not all(is_kept(store) for _ in range(3))

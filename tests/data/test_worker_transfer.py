"""Batches of worker processes: as torch would give them, over sockets that stay open."""

from __future__ import annotations

import gc
import os
import resource
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.multiprocessing import reductions

from loopkit.data import Loader
from loopkit.data.indexed import IndexedSource
from loopkit.data.sampler import Sharding
from loopkit.errors import DataError

SAMPLES, BATCH = 24, 4


class Numbers:
    """The samples are their indices."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return index


class Parts(NamedTuple):
    """A batch of one's own."""

    whole: torch.Tensor
    half: torch.Tensor


def several(samples: list[int]) -> dict[str, Any]:
    """A batch with tensors of several kinds, two of which share their memory."""
    whole = torch.tensor(samples, dtype=torch.float64)
    return {
        "parts": Parts(whole, whole[: len(whole) // 2]),
        "again": [whole, {"mask": whole > 3}],
        "half precision": whole.to(torch.bfloat16),
        "transposed": whole.view(2, -1).t(),
        "sparse": torch.eye(3).to_sparse() * samples[0],
        "empty": torch.zeros(0, 5),
        "nothing": None,
        "text": [f"sample {index}" for index in samples],
    }


def many(samples: list[int], count: int) -> list[torch.Tensor]:
    return [torch.tensor(samples) + number for number in range(count)]


def words(samples: list[int]) -> list[str]:
    return [str(index) for index in samples]


def unpicklable(samples: list[int]) -> Any:
    return lambda: samples


def source(collate: Callable[[list[int]], Any], num_workers: int, **options: Any) -> IndexedSource:
    loader = Loader(Numbers(), collate_fn=collate, num_workers=num_workers, **options)

    def shard(length: int) -> Sharding:
        return Sharding(length, BATCH, 0, 1)

    return IndexedSource(loader, shard, seed=1, shuffle=True, seeded=True)


def epoch(read: IndexedSource, number: int = 0) -> list[Any]:
    return [item.batch for item in read.open(number, 0)]


def same(found: Any, wanted: Any) -> bool:
    """Whether two batches hold the same, tensors of the same type and layout."""
    if isinstance(wanted, torch.Tensor):
        alike = found.dtype == wanted.dtype and found.layout == wanted.layout
        if wanted.layout != torch.strided:
            found, wanted = found.to_dense(), wanted.to_dense()
        return alike and found.stride() == wanted.stride() and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, (list, tuple)):
        alike = type(found) is type(wanted) and len(found) == len(wanted)
        return alike and all(map(same, found, wanted))
    return bool(found == wanted)


@pytest.fixture
def no_connections(monkeypatch):
    """Lets torch make no connection for a tensor in this process."""
    monkeypatch.setattr(reductions, "rebuild_storage_fd", None)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_batches_of_this_process(context, no_connections):
    read = source(several, 2, multiprocessing_context=context)
    wanted = epoch(source(several, 0))
    assert len(wanted) == SAMPLES // BATCH
    found = epoch(read)
    assert same(found, wanted)
    for batch in found:
        batch["parts"].half.add_(100)
        assert batch["parts"].whole[0] >= 100, "two views of one memory stay that"
        assert batch["again"][0] is batch["parts"].whole


@pytest.mark.parametrize("persistent", [True, False])
def test_a_pass_that_ended_early_leaves_nothing_to_the_next(persistent, no_connections):
    read = source(several, 2, persistent_workers=persistent)
    for number in range(3):
        begun = read.open(number, 0)
        next(begun)
        begun.close()
    assert same(epoch(read, 3), epoch(source(several, 0), 3))


@pytest.mark.parametrize("collate", [words, partial(many, count=300)])
def test_batches_without_tensors_and_with_very_many_go_torchs_way(collate):
    assert same(epoch(source(collate, 2)), epoch(source(collate, 0)))


def test_a_batch_that_finds_its_socket_full_goes_torchs_way(monkeypatch):
    original = socket.send_fds

    def full_at_each_second_batch(sender, buffers, fds, flags):
        if buffers[0][8] % 2:  # the low byte of the number
            raise BlockingIOError
        return original(sender, buffers, fds, flags)

    monkeypatch.setattr(socket, "send_fds", full_at_each_second_batch)  # forked workers have it too
    assert same(epoch(source(several, 1)), epoch(source(several, 0)))


def test_the_strategy_that_shares_by_file_names_is_kept(monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "get_sharing_strategy", lambda: "file_system")
    read = source(several, 1)
    assert same(epoch(read), epoch(source(several, 0)))
    assert read._workers is not None
    assert not hasattr(read._workers.collate_fn.transfer, "_senders")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's list of open files")
def test_no_file_stays_open():
    before = open_files()
    read = source(several, 2, persistent_workers=True)
    epoch(read)
    while_reading = open_files()
    for number in range(1, 5):
        epoch(read, number)
        assert open_files() <= while_reading
    read.close()
    del read
    gc.collect()
    assert open_files() <= before


def test_a_process_that_may_open_no_more_files_says_so():
    read = source(partial(many, count=100), 1)
    batches = read.open(0, 0)
    held = [next(batches)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, limits[1])
    )
    try:
        with pytest.raises(
            DataError, match=r"100 tensors, of which this process could take \d+:.*ulimit -n"
        ):
            held.extend(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_batch_that_cannot_be_sent_is_an_error():
    with pytest.raises(DataError, match=r"cannot be sent from a worker process.*unpicklable"):
        epoch(source(unpicklable, 1))

"""A data worker that is killed or hangs ends the run with one error that says where the data was."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset, IterableDataset

from loopkit import Loader
from loopkit.distributed.failures import kind_of
from loopkit.errors import DataError
from tests.support import Tiny, points, quiet


def fail(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


class Mapped(Dataset):
    def __init__(self, how: str) -> None:
        self.how, self.points = how, points(40)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            fail(self.how)
        return self.points[index]


class Streamed(IterableDataset):
    def __init__(self, how: str) -> None:
        self.how = how

    def __iter__(self) -> Any:
        for number, point in enumerate(points(40)):
            if number == 20:
                fail(self.how)
            yield point


class Reads(Tiny):
    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data = data

    def train_data(self) -> Any:
        return self.data


KINDS = {
    "Loader": (lambda how: Loader(Mapped(how), 4, num_workers=1, timeout=2), "of samples"),
    "DataLoader": (
        lambda how: DataLoader(Streamed(how), 4, num_workers=1, timeout=2),
        r"worker of the DataLoader over Streamed failed at or after batch \d of epoch 0",
    ),
}


@pytest.mark.parametrize("how", ["killed", pytest.param("hangs", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_is_gone_or_late_is_named_with_its_batch(kind, how):
    data, says = KINDS[kind]
    with pytest.raises(DataError, match=says) as failed:
        quiet(eval_every="never", steps=20).run(Reads(data(how)))
    # Among ranks it is the cause, and no sign of another rank that is gone or hangs.
    assert kind_of(failed.value) == "local"

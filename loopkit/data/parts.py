"""The data sets of a CombinedLoader: where each stands, pass after pass."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loopkit import rng
from loopkit.data.indexed import IndexedSource
from loopkit.data.stream import StreamSource
from loopkit.errors import DataError


@dataclass(slots=True)
class Slot:
    """One batch of one data set, read or still to be read: its samples, and the position after."""

    size: int
    end: int
    content: Any


class IndexedTrack:
    """The batches of a map-style data set, pass after pass. Each rank reads its own alone."""

    def __init__(
        self, source: IndexedSource, rank: int, num_replicas: int, *, cycles: bool
    ) -> None:
        self.source = source
        self._turn = rank, num_replicas
        self._cycles = cycles
        self._epoch = 0
        self._reader: Generator[Any, None, None] | None = None

    def open(self, epoch: int, again: int, position: int, saved: Any) -> Iterator[Slot]:
        """Yield the slots of one pass from a position, in samples."""
        if not again or self._reader is None:
            self.source.begin_epoch(epoch)
            self._epoch = epoch
        return self._slots(again, position)

    def stop(self) -> None:
        """Stop what reads ahead."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _slots(self, again: int, position: int) -> Iterator[Slot]:
        end, size = self.source.sharding.end, self.source.sharding.batch_size
        for low in range(position, end, size):
            high = min(low + size, end)
            yield Slot(high - low, high, (again, low, high))

    def read(self, slot: Slot, number: int) -> Any:
        """Return the batch of a slot that is this rank's: the batch ``number`` of all ranks."""
        if self._reader is None:
            self._reader = self.source.read(self._requests(slot, number))
        return next(self._reader)

    def read_for_others(self, slot: Slot) -> Any:
        """Return the batch of a slot that is another rank's."""
        again, low, high = slot.content
        order = self._order(again)
        return self.source.read_one(order, self.source.permutation(order)[low:high])

    def _requests(self, first: Slot, number: int) -> Iterator[tuple[int, Any]]:
        """Yield the order and the indices of this rank's batches, which workers read ahead."""
        rank, num_replicas = self._turn
        again, position, _ = first.content
        while True:
            order = self._order(again)
            indices = self.source.permutation(order)
            for slot in self._slots(again, position):
                if number % num_replicas == rank:
                    yield order, indices[slot.content[1] : slot.content[2]]
                number += 1
            if not self._cycles or not self.source.sharding.end:
                return
            again, position = again + 1, 0

    def _order(self, again: int) -> int:
        return self._epoch if not again else rng.mix(self._epoch, again)

    def state(self) -> Any:
        """Return None: the position is all that is needed."""


class StreamTrack:
    """The batches of an iterable, pass after pass. Every rank reads all of them."""

    def __init__(self, source: StreamSource) -> None:
        self.source = source

    def open(self, epoch: int, again: int, position: int, saved: Any) -> Iterator[Slot]:
        """Yield the slots of one pass from a position, in batches."""
        if saved is not None:
            self.source.load_state(saved)
        items = self.source.open(epoch, position, again)
        return (Slot(size, end, batch) for batch, size, _, end in items)

    def stop(self) -> None:
        """Do nothing: nothing is read ahead."""

    def read(self, slot: Slot, number: int) -> Any:
        """Return the batch of a slot."""
        return slot.content

    def read_for_others(self, slot: Slot) -> Any:
        """Return the batch of a slot."""
        return slot.content

    def state(self) -> Any:
        """Return what is needed besides the position to continue there."""
        return self.source.state()


class Part:
    """One data set of several: how often it was read in this epoch, and where it stands."""

    def __init__(self, track: IndexedTrack | StreamTrack, what: str) -> None:
        self.track = track
        self.what = what
        self.source = track.source
        self.again = 0
        self.position = 0
        self.ended = False
        self._epoch = 0
        self._slots: Iterator[Slot] = iter(())
        self._next: Slot | None = None

    def begin(self, epoch: int, saved: Mapping[str, Any]) -> None:
        """Start an epoch, or continue it where it was saved."""
        self._epoch = epoch
        self.again, self.position = saved.get("again", 0), saved.get("position", 0)
        self.ended = saved.get("ended", False)
        self._slots = self.track.open(epoch, self.again, self.position, saved.get("state"))
        self._next = None

    def peek(self) -> Slot | None:
        """Return the next batch of this pass; None at its end."""
        if self._next is None:
            self._next = next(self._slots, None)
            self.ended |= self._next is None
        return self._next

    def start_again(self) -> None:
        """Start another pass in the same epoch."""
        self.again, self.position = self.again + 1, 0
        self._slots = self.track.open(self._epoch, self.again, 0, None)
        if self.peek() is None:
            raise DataError(
                f"{self.what} gave no batch when it was started again, as the data beside it is "
                "longer: it is empty, or can be read only once"
            )

    def take(self) -> Slot:
        """Return the next batch, and stand behind it."""
        slot = self.peek()
        assert slot is not None
        self._next, self.position = None, slot.end
        return slot

    def state(self) -> dict[str, Any]:
        """Return what continues here."""
        return {
            "again": self.again,
            "position": self.position,
            "ended": self.ended,
            "state": self.track.state(),
        }

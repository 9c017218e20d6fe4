"""CombinedLoader: several data sets read together, and the source that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Literal

from loopkit.checks import checked_choice
from loopkit.data.indexed import IndexedSource
from loopkit.data.parts import IndexedTrack, Part, Slot, StreamTrack
from loopkit.data.sampler import WorkItem
from loopkit.data.stream import BatchCounting, StreamSource
from loopkit.errors import OptionError
from loopkit.keywords import checks_keywords

Mode = Literal["max_size_cycle", "min_size", "max_size", "sequential"]
MODES = ("max_size_cycle", "min_size", "max_size", "sequential")


@checks_keywords
class CombinedLoader:
    """Several data sets that are read together, with the modes of Lightning's CombinedLoader.

    A batch is a dict or a list like ``iterables``, with a batch of each. It is None for one that
    has no part in this batch.

    Example::

        def train_data(self):
            return CombinedLoader({"labelled": self.few, "unlabelled": self.many}, "min_size")

    Args:
        iterables: a dict or a list of what ``train_data`` can return: Datasets, Loaders,
            DataLoaders, iterables of batches.
        mode: when a pass ends. "max_size_cycle" reads all to their end, and starts shorter ones
            again, in another order. "min_size" ends with the shortest. "max_size" ends with the
            longest, and gives None for those that have ended. "sequential" reads one after the
            other, and gives None for those whose turn it is not.

    Raises:
        OptionError: an unknown mode or argument.
    """

    def __init__(self, iterables: Mapping[str, Any] | Sequence[Any], mode: Mode) -> None:
        self.iterables = iterables
        self.mode = checked_choice(mode, "CombinedLoader(mode=)", MODES)


class CombinedSource(BatchCounting):
    """The batches of several sources, one of each for every batch. The position counts batches.

    On several ranks, each takes every n-th batch, as in a StreamSource. A state tells where each
    source stands, in its own unit. So a resume is exact with other batch sizes and ranks, too.

    Args:
        data: the data sets and the mode.
        sources: a source for each, opened for one rank alone.
        what: what returned the data, for messages.
        rank: the data-parallel rank.
        num_replicas: the number of data-parallel ranks that share the batches.
        seeded: whether reading is a function of the seed.
    """

    uneven = False
    keeps_state = True
    limit: int | None = None

    def __init__(
        self,
        data: CombinedLoader,
        sources: Mapping[str, IndexedSource | StreamSource],
        what: str,
        *,
        rank: int,
        num_replicas: int,
        seeded: bool,
    ) -> None:
        self.mode = data.mode
        self.seeded = seeded
        self.rank = rank
        self.num_replicas = num_replicas
        self._named = isinstance(data.iterables, Mapping)
        cycles = data.mode == "max_size_cycle"
        self._parts = {
            name: Part(
                IndexedTrack(source, rank, num_replicas, cycles=cycles)
                if isinstance(source, IndexedSource)
                else StreamTrack(source),
                f"{what}[{name!r}]",
            )
            for name, source in sources.items()
        }
        self._restored: dict[str, Any] = {}
        self._state: dict[str, Any] | None = None

    def samples_at_once(self) -> int:
        """Return the samples of one batch of each source on all ranks.

        Raises:
            OptionError: the number is not known.
        """
        if self.mode not in ("min_size", "max_size_cycle"):
            raise OptionError(
                "global_batch_size needs the number of samples that all devices take at once, and "
                "that of several data sets is the same for each batch only in the modes min_size "
                "and max_size_cycle: give accumulate="
            )
        return sum(p.source.samples_at_once() for p in self._parts.values()) * self.num_replicas

    def promised(self) -> int | None:
        """Return the position at the end of an epoch, by the lengths of the sources."""
        lengths = [part.source.batches_per_epoch() for part in self._parts.values()]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return None
        shortest, total = self.mode == "min_size", max(known)
        if shortest or self.mode == "sequential":
            total = min(known) if shortest else sum(known)
        return total if self.limit is None else min(total, self.limit * self.num_replicas)

    def end(self) -> None:
        """Return None: only reading on tells the end."""

    def open(self, epoch: int, start: int) -> Iterator[WorkItem]:
        """Yield this rank's micro-batches from ``start`` of ``epoch``, in batches.

        At the end of the data a rank may get a dummy batch, of size 0.

        Raises:
            DataError: a source has no batch.
        """
        restored, self._restored = self._restored, {}
        for name, part in self._parts.items():
            part.begin(epoch, restored.get(name, {}))
        try:
            yield from self._items(start)
        finally:
            for part in self._parts.values():
                part.track.stop()

    def _items(self, position: int) -> Iterator[WorkItem]:
        for number in count(0, self.num_replicas):
            if self.limit is not None and position >= self.limit * self.num_replicas:
                return
            batch, sizes = self._turn(number)
            if not sizes:
                return
            size = sizes[self.rank] if self.rank < len(sizes) else 0
            position += len(sizes)
            self._state = {name: part.state() for name, part in self._parts.items()}
            yield WorkItem(batch, size, sum(sizes), position)

    def _turn(self, number: int) -> tuple[Any, list[int]]:
        """Return this rank's batch of a turn, and the samples of all ranks' batches."""
        batch, sizes = None, list[int]()
        first: dict[str, Slot | None] = {}
        for rank in range(self.num_replicas):
            slots = self._next()
            if slots is None:
                break
            first = first or slots
            sizes.append(sum(slot.size for slot in slots.values() if slot is not None))
            if rank == self.rank:
                batch = self._batch(slots, lambda part, slot: part.track.read(slot, number + rank))  # noqa: B023
        if sizes and len(sizes) <= self.rank:
            batch = self._batch(first, lambda part, slot: part.track.read_for_others(slot))
        return batch, sizes

    def _batch(
        self, slots: Mapping[str, Slot | None], read: Callable[[Part, Slot], Any]
    ) -> dict[str, Any] | list[Any]:
        batch = {
            name: None if slot is None else read(self._parts[name], slot)
            for name, slot in slots.items()
        }
        return batch if self._named else list(batch.values())

    def _next(self) -> dict[str, Slot | None] | None:
        """Return the next batch of each source, None for one without part; None at the end."""
        parts = self._parts.values()
        if self.mode == "sequential":
            turn = next((part for part in parts if not part.ended and part.peek()), None)
            taken = [turn] if turn is not None else []
        else:
            # Those that may end the pass first: the others then lose nothing.
            running = [part for part in parts if not part.ended and part.peek() is not None]
            over = len(running) < len(parts) if self.mode == "min_size" else not running
            if self.mode == "max_size_cycle" and not over:
                for part in parts:
                    if part.peek() is None:
                        part.start_again()
                running = list(parts)
            taken = [] if over else running
        if not taken:
            return None
        return {name: part.take() if part in taken else None for name, part in self._parts.items()}

    def stateful_parts(self) -> list[Any]:
        """Return the objects that reading changes and that have ``state_dict``."""
        return [each for part in self._parts.values() for each in part.source.stateful_parts()]

    def state(self) -> dict[str, Any] | None:
        """Return where each source stands."""
        return self._state

    def end_state(self) -> dict[str, Any]:
        """Return what the sources need for the next pass, where a pass has ended."""
        return {name: {"state": part.source.end_state()} for name, part in self._parts.items()}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take back what ``state`` or ``end_state`` returned, for the next ``open``."""
        self._restored = dict(state or {})

    def close(self) -> None:
        """End the worker processes of all sources."""
        for part in self._parts.values():
            part.source.close()

"""Training data in groups of micro-batches, one group for each optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from loopkit.data.sampler import WorkItem
from loopkit.data.sources import Source
from loopkit.errors import LoopkitWarning
from loopkit.nested import token_count


@dataclass(slots=True, eq=False, repr=False)
class MicroBatches(list[Any]):
    """The micro-batches of one optimizer step, on the device, and their counts.

    Attributes:
        sizes: samples in each micro-batch of this rank. A dummy batch has size 0: it is forwarded
            so that every rank takes part in the step, with weight zero.
        samples: samples in all micro-batches of this rank.
        total: samples in all micro-batches of all ranks.
        start: the data position before the group, in the unit of the source.
        end: the data position after the group.
        tokens: elements of ``input_ids`` on all ranks; 0 where batches have none.
        last: whether the group is known to be the last of its epoch.
        longer: whether the pass is longer with this group than it was known to be.
        state: the source's own state after the group, for sources that have one.
    """

    start: int = 0
    end: int = 0
    sizes: list[int] = field(default_factory=list)
    samples: int = 0
    total: int = 0
    tokens: int = 0
    last: bool = False
    longer: bool = False
    state: Any = None

    def with_batches(self, batches: Iterable[Any], sizes: Iterable[int]) -> MicroBatches:
        """Return a copy that holds ``batches`` of ``sizes``; all other attributes are kept."""
        group = copy(self)
        group[:] = batches
        group.sizes = list(sizes)
        return group

    def padded(self, count: int) -> MicroBatches:
        """Return a copy of ``count`` micro-batches: dummy batches fill it up.

        Each counts as one unit of the position, as in sources whose ranks read data of their own.
        """
        missing = count - len(self)
        group = self.with_batches([*self, *self[-1:] * missing], [*self.sizes, *[0] * missing])
        group.end = group.start + count
        return group

    def dummies(self, count: int) -> MicroBatches:
        """Return a group of ``count`` dummy batches, without samples, that follows this one."""
        group = self.with_batches(self[-1:] * count, [0] * count)
        group.start = self.end
        group.end = self.end + count
        group.samples = 0
        group.total = 0
        group.tokens = 0
        return group


class MicroBatchLoader:
    """Training data in groups of micro-batches, one group for each optimizer step.

    Args:
        source: where the micro-batches come from.
        accumulate: micro-batches per group; the last group of an epoch may hold fewer.
        to_device: moves groups to the device (``data.transfer.group_transfer_fn``); None leaves
            them where they are.

    Attributes:
        measured: the end of the last pass by ``len()``, and its end as it was, both as positions;
            None before. A checkpoint keeps it.
    """

    def __init__(
        self,
        source: Source,
        accumulate: int,
        to_device: Callable[..., Iterator[MicroBatches]] | None = None,
    ) -> None:
        self.source = source
        self.accumulate = accumulate
        self.to_device = to_device
        self.measured: tuple[int, int] | None = None
        self._reported = False

    def _end(self) -> int | None:
        """Return the position at the end of a pass, as far as it is known."""
        exact, promised = self.source.end(), self.source.promised()
        if exact is None and self.measured is not None and self.measured[0] == promised:
            return self.measured[1]
        return promised if exact is None else exact

    def steps_per_epoch(self) -> int | None:
        """Return the optimizer steps in one epoch; None for data without a length.

        Where ``len()`` is a guess, the last pass tells better.
        """
        end = self._end()
        return None if end is None else self._steps(end)

    def _steps(self, positions: int) -> int:
        batches = -(-max(0, positions) // self.source.stride())
        return -(-batches // self.accumulate)

    def steps_before(self, position: int) -> int:
        """Return the optimizer steps of one epoch up to a position, by the length of the data."""
        end = self._end()
        # A position that another batch size has reached need not be a multiple of the stride.
        return 0 if end is None else self._steps(end) - self._steps(end - position)

    def stride(self) -> int:
        """Return by how much an optimizer step, but the last of an epoch, moves the position."""
        return self.accumulate * self.source.stride()

    def end_state(self) -> Any:
        """Return what the next pass needs of the source, where a pass has ended."""
        return self.source.end_state()

    def open(self, epoch: int, start: int) -> Iterator[MicroBatches]:
        """Yield the groups of ``epoch`` from the position ``start``; the last one is marked.

        For data without a length, a group is the last if no other follows. Reading on to find out
        would draw random numbers before their time, so under ``rng="stream"`` the last group of
        such data is not marked.
        """
        source = self.source
        groups = self._groups(source.open(epoch, start), start)
        if self.to_device is not None:
            groups = self.to_device(groups)
        if source.end() is None and source.seeded and not source.uneven:
            groups = _with_last_marked(groups)
        return self._measuring(groups) if source.end() is None else groups

    def _measuring(self, groups: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Yield the groups of a pass, and measure how long it is where ``len()`` may be wrong."""
        promised, end = self.source.promised(), 0
        for group in groups:
            end, expected = group.end, self._end()
            if promised is not None and expected is not None and group.start >= expected:
                self.measured = promised, end
                group.longer = True
            if group.last and promised is not None:  # nobody asks for another group
                self._measure(promised, end)
            yield group
        if end and promised is not None:
            self._measure(promised, end)

    def _measure(self, promised: int, end: int) -> None:
        """Keep the length of a whole pass, and report a promise that was wrong."""
        self.measured = promised, end
        steps, said = self._steps(end), self._steps(promised)
        if steps != said and not self._reported:
            self._reported = True
            warnings.warn(
                f"the training data says by its len() that a pass has {said} steps, and it had "
                f"{steps}. Epochs are counted as passes; schedules, percentages and parts of "
                f"epochs count with {steps} steps from here on",
                LoopkitWarning,
                stacklevel=2,
            )

    def _groups(self, items: Iterator[WorkItem], start: int) -> Iterator[MicroBatches]:
        source = self.source
        accumulate = self.accumulate
        epoch_end = source.end()
        keeps_state = source.keeps_state
        group = MicroBatches(start, start)
        for batch, size, total, end in items:
            group.append(batch)
            group.sizes.append(size)
            group.samples += size
            group.total += total
            group.end = end
            # The check for a Mapping is slow, so tuples and lists are excluded first.
            if size and not isinstance(batch, (tuple, list)) and isinstance(batch, Mapping):
                group.tokens += token_count(batch)
            if len(group) == accumulate or end == epoch_end:
                group.last = end == epoch_end
                if keeps_state:
                    group.state = source.state()
                yield group
                group = MicroBatches(end, end)
        if group:
            group.state = source.state() if keeps_state else None
            yield group


def _with_last_marked(groups: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
    held = next(groups, None)
    while held is not None:
        following = next(groups, None)
        held.last = following is None
        yield held
        held = following

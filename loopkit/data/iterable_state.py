"""The state of an iterable: its own, that of its generators, and how it is read."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from loopkit import rng
from loopkit.data.known_streams import has_state
from loopkit.errors import DataError, LoopkitWarning


class IterableState:
    """What a resume needs to continue an iterable, besides the position.

    - The iterable's own ``state_dict``, or that of the data set in a DataLoader without workers.
    - The state of the generators in a DataLoader and its samplers, as of the start of the pass.
    - Under ``rng="stream"``, torch's random streams as of the start of the pass.
    - The batch size and the workers, with which alone a position in batches means the same.

    Args:
        batches: the iterable.
        keeps_streams: whether to keep the random streams.

    Attributes:
        stateful: the object with ``state_dict`` and ``load_state_dict``; None without one.
        exhausted: whether the pass was read to its end.
    """

    def __init__(self, batches: Any, *, keeps_streams: bool) -> None:
        self.batches = batches
        self.stateful = _stateful(batches)
        self.exhausted = False
        self._keeps_streams = keeps_streams
        self._generators = _generators(batches)
        self._reading = _reading(batches)
        self._own: Any = None
        self._ended = False
        self._streams: Any = None
        self._states: list[Any] = []
        self._restored: dict[str, Any] = {}

    @property
    def is_kept(self) -> bool:
        """Whether there is anything to keep."""
        has_state = self.stateful is not None or bool(self._generators or self._reading)
        return has_state or self._keeps_streams

    def note(self, iterator: Any) -> None:
        """Keep the iterable's own state as of now.

        Args:
            iterator: what reads the iterable. A DataLoader meets the end of its data set with a
                last batch that is short, and the state is then that of an ended pass.
        """
        assert self.stateful is not None
        self._own = copy.deepcopy(self.stateful.state_dict())
        self._ended = bool(getattr(getattr(iterator, "_dataset_fetcher", None), "ended", False))

    def begin(self) -> Iterator[Any]:
        """Return the iterator of a pass, with the state that the last one left."""
        restored, self._restored = self._restored, {}
        self._set_generators(restored)
        self.exhausted, self._own, self._ended = False, None, False
        if "own" in restored and self.stateful is not None:
            self.stateful.load_state_dict(restored["own"])
            if not restored["exhausted"]:
                # The run that was saved had begun a pass, and now begins the next one.
                with rng.preserved():
                    iter(self.batches)
        self._states = [generator.get_state() for generator in self._generators]
        if self._keeps_streams:
            self._streams = rng.get_state()
        iterator = iter(self.batches)
        return _not_empty(iterator, self.batches) if "own" in restored else iterator

    @property
    def has_own(self) -> bool:
        """Whether the iterable's own state was saved, and can be loaded."""
        return self.stateful is not None and self._restored.get("own") is not None

    def resume(self) -> Iterator[Any]:
        """Return the iterator of a pass that continues from the iterable's own state."""
        restored, self._restored = self._restored, {}
        assert self.stateful is not None
        if restored.get("ended"):
            # The pass has no more batches. The next one begins with this state.
            self._restored = {"own": restored["own"], "exhausted": True}
            return iter(())
        self.stateful.load_state_dict(restored["own"])
        self._streams, self._states = restored.get("streams"), restored.get("generators", [])
        self.exhausted = False
        with rng.preserved():  # a DataLoader draws a seed for its workers
            return iter(self.batches)

    def rewind(self) -> None:
        """Set all generators as they were at the start of the pass, to read it again."""
        restored, self._restored = self._restored, {}
        self._set_generators(restored)
        if restored.get("streams"):
            rng.set_state(restored["streams"])

    def _set_generators(self, restored: dict[str, Any]) -> None:
        for generator, state in zip(self._generators, restored.get("generators", [])):
            generator.set_state(state)

    def check_reading(self, position: int) -> None:
        """Refuse a position in batches of another size, or of other workers.

        Raises:
            DataError: the position would be that of other samples.
        """
        saved = self._restored.get("reading")
        if saved is None or saved == self._reading or self.has_own:
            return
        now = self._reading or {}
        shown = ", ".join(f"{name}={value}" for name, value in saved.items())
        instead = ", ".join(f"{name}={now.get(name)}" for name in saved)
        raise DataError(
            f"the checkpoint stands after {position} batches of an iterable that was read with "
            f"{shown}, and now it is read with {instead}: the position would be that of other "
            "samples. Resume with the settings of before, or from a checkpoint between two epochs, "
            "or give the data state_dict and load_state_dict"
        )

    def within_pass(self) -> dict[str, Any] | None:
        """Return what is needed besides the position to continue there; None for nothing."""
        state = {
            "own": self._own,
            "streams": self._streams,
            "generators": self._states or None,
            "reading": self._reading,
            "ended": self._ended or None,
        }
        kept = {name: value for name, value in state.items() if value is not None}
        return kept or None

    def after_pass(self) -> dict[str, Any] | None:
        """Return what the next pass needs; None for nothing."""
        kept: dict[str, Any] = dict(self._restored)
        if self.stateful is not None and not kept:
            kept |= {"own": copy.deepcopy(self.stateful.state_dict()), "exhausted": self.exhausted}
        if self._generators:
            kept["generators"] = [generator.get_state() for generator in self._generators]
        self._own = None
        return kept or None

    def load(self, state: dict[str, Any] | None) -> None:
        """Take back what ``within_pass`` or ``after_pass`` returned."""
        self._restored = dict(state or {})


def _stateful(batches: Any) -> Any:
    if has_state(batches):
        return batches
    if not isinstance(batches, DataLoader) or not has_state(batches.dataset):
        return None
    if not batches.num_workers:
        return batches.dataset if isinstance(batches.dataset, IterableDataset) else None
    if isinstance(batches.dataset, IterableDataset):
        warnings.warn(
            f"{type(batches.dataset).__name__} has a state, which its worker processes keep to "
            "themselves: a resume reads the pass again up to its position. Take num_workers=0, or "
            "torchdata's StatefulDataLoader, to save it",
            LoopkitWarning,
            stacklevel=2,
        )
    return None


def _generators(batches: Any) -> list[torch.Generator]:
    """Return the generators of a DataLoader, of its samplers, and of a sampler's own sampler."""
    if not isinstance(batches, DataLoader) or has_state(batches):
        return []
    waiting: list[Any] = [batches]
    found: list[torch.Generator] = []
    seen: set[int] = set()
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        kept = getattr(part, "__dict__", {}).values()
        found += [value for value in kept if isinstance(value, torch.Generator)]
        waiting += [getattr(part, name, None) for name in ("batch_sampler", "sampler")]
    return list({id(generator): generator for generator in found}.values())


def _reading(batches: Any) -> dict[str, Any] | None:
    """Return the settings on which the samples of each batch depend; None where there are none."""
    if not isinstance(batches, DataLoader) or batches.batch_size is None:
        return None
    settings = {"batch_size": batches.batch_size}
    if isinstance(batches.dataset, IterableDataset):
        settings["num_workers"] = max(1, batches.num_workers)  # one reads in the order of none
    return settings


def _not_empty(iterator: Iterator[Any], batches: Any) -> Iterator[Any]:
    """Yield the batches of a pass; start again if the restored state is that of an ended pass."""
    for first in iterator:
        yield first
        yield from iterator
        return
    yield from iter(batches)

"""Loader: a data set, and how to read it in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import ConcatDataset

from loopkit.checks import checked_int
from loopkit.data.known_streams import set_next_epoch, set_stage_epochs
from loopkit.errors import OptionError
from loopkit.keywords import checks_keywords

OUT_OF_ORDER = (
    "batches that come when they are ready have no position to resume from, and their order changes "
    "from run to run: leave in_order out"
)


@checks_keywords
class Loader:
    """A data set, and how to read it in batches.

    It takes the arguments of ``torch.utils.data.DataLoader`` and a few more. What is left None
    depends on the use: training shuffles, evaluation does not.

    Example::

        def train_data(self):
            return Loader(self.texts, num_workers=4, collate_fn=Padded(), group_by_length=True)

    Args:
        dataset: anything with ``len()`` and ``[index]``, or a ``torch.utils.data.IterableDataset``.
        batch_size: samples per batch and device; None takes ``Fit(batch_size=)`` or
            ``eval_batch_size``.
        shuffle: a new order in every epoch.
        num_workers: processes that read ahead; 0 reads in the training process.
        pin_memory: page-locked memory for the copy to a GPU; "auto" pins where there is a GPU.
        drop_last: leave out the last, shorter batch of an epoch.
        prefetch_factor: batches that each worker reads ahead; None takes torch's default.
        persistent_workers: keep the workers between epochs.
        collate_fn: makes a batch of a list of samples; None stacks tensors, numbers and arrays,
            through dicts and tuples.
        columns: for samples that are dicts, the keys to keep.
        group_by_length: put samples of about the same length into a batch. True takes ``len()`` of
            a sample, or of its "input_ids"; a key takes ``len()`` of that entry. A sequence gives
            the length of each sample.
        weights: draw samples with replacement, each with a chance in proportion to its weight;
            [samples].
        length: samples per epoch, where ``weights`` draws them; None takes the data set's length.
        timeout: seconds to wait for a worker before giving up; 0 waits for ever.
        worker_init_fn: called in each worker with its number, before it reads.
        multiprocessing_context: how workers start: "fork", "spawn", "forkserver" or a context;
            None takes the platform's default.
        pin_memory_device: the device for which memory is page-locked, as torch names it.
        generator: its seed decides this loader's order and augmentation, in place of ``data_seed``.
            The position decides the rest, so the state of the generator has no effect.
        in_order: must stay True, since a position means nothing for batches out of order.
        sharded: the IterableDataset gives each rank samples of its own, so ranks may run out at
            different times. Otherwise every rank reads all samples and takes its share of them.

    Raises:
        OptionError: an unknown argument, or a number that is not whole or too small.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        shuffle: bool | None = None,
        num_workers: int = 0,
        pin_memory: bool | str = "auto",
        drop_last: bool = False,
        prefetch_factor: int | None = 2,
        persistent_workers: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        columns: Sequence[str] | None = None,
        group_by_length: bool | str | Sequence[int] = False,
        weights: Sequence[float] | torch.Tensor | None = None,
        length: int | None = None,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: str | BaseContext | None = None,
        pin_memory_device: str = "",
        generator: torch.Generator | None = None,
        in_order: bool = True,
        sharded: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = checked_int(batch_size, "Loader(batch_size=)", or_none=True)
        self.shuffle = shuffle
        self.num_workers = checked_int(num_workers, "Loader(num_workers=)", at_least=0)
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.prefetch_factor = checked_int(
            prefetch_factor, "Loader(prefetch_factor=)", or_none=True
        )
        self.persistent_workers = persistent_workers
        self.collate_fn = collate_fn
        self.columns = None if columns is None else tuple(columns)
        self.group_by_length = group_by_length
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        self.length = checked_int(length, "Loader(length=)", or_none=True)
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.multiprocessing_context = multiprocessing_context
        self.pin_memory_device = pin_memory_device
        self.generator = generator
        self.in_order = in_order
        if not in_order:
            raise OptionError(f"Loader(in_order=False): {OUT_OF_ORDER}")
        self.sharded = sharded

    def worker_options(self) -> dict[str, Any]:
        """Return the arguments of ``torch.utils.data.DataLoader`` that concern its workers."""
        options: dict[str, Any] = {
            "num_workers": self.num_workers,
            "worker_init_fn": self.worker_init_fn,
            "pin_memory": self.pin_memory,
        }
        if self.pin_memory == "auto":
            options["pin_memory"] = torch.cuda.is_available()
        if self.num_workers:
            options |= {
                "prefetch_factor": self.prefetch_factor,
                "persistent_workers": self.persistent_workers,
                "multiprocessing_context": self.multiprocessing_context,
                "timeout": self.timeout,
            }
        if self.pin_memory_device:
            options["pin_memory_device"] = self.pin_memory_device
        return options


def dataset_length(loader: Loader) -> int:
    """Return how many samples an epoch reads: those of the data set, or as many as are drawn.

    Raises:
        TypeError: the data set has no length.
    """
    length = len(loader.dataset)
    if loader.weights is not None and loader.length is not None and length:
        length = loader.length
    return length


def announce_epoch(data: Any, epoch: int) -> bool:
    """Call ``set_epoch`` on data, and on the samplers and data sets inside of it.

    Returns:
        Whether any of them has ``set_epoch``.
    """
    waiting, seen, found = [data], set[int](), False
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
            found = True
        waiting += [getattr(part, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        found = set_next_epoch(part, epoch) or found
        pipeline = getattr(part, "pipeline", None)
        if isinstance(pipeline, list):
            found = set_stage_epochs(pipeline, epoch) or found
            waiting += pipeline
        several = getattr(part, "datasets", None)
        waiting += several if isinstance(several, (list, tuple)) else []
    return found


def mixed(
    datasets: Mapping[str, Any],
    shares: Mapping[str, float],
    *,
    length: int | None = None,
    **options: Any,
) -> Loader:
    """Return a Loader over several data sets, each with its share of the samples.

    Args:
        datasets: map-style data sets by name.
        shares: the share of each data set by name, in proportion to the others. A data set with a
            share of 0 is not read.
        length: samples per epoch; None takes as many as the data sets hold together.
        options: further arguments of ``Loader``.

    Raises:
        OptionError: a data set without a share, or a share without a data set.
    """
    if datasets.keys() != shares.keys():
        raise OptionError(
            f"mixed(): the data sets are {', '.join(datasets)}, the shares are for "
            f"{', '.join(shares)}"
        )
    per_sample = [
        torch.full((len(dataset),), shares[name] / max(1, len(dataset)))
        for name, dataset in datasets.items()
    ]
    joined: ConcatDataset[Any] = ConcatDataset(datasets.values())
    return Loader(joined, weights=torch.cat(per_sample), length=length, **options)

"""A task that reads a stream of another library, and runs of it that stop and resume."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset

from loopkit import Checkpoint, Fit, Loader, Task
from loopkit.optim import SGD

COUNT = 24
SHARED = ("datasets", "datasets shuffled", "webdataset", "torchdata")
# Each rank reads a part of its own. "streaming" is the package of mosaicml-streaming.
DIVIDING = ("torch", "litdata", "streaming")
PACKAGES = {"datasets shuffled": "datasets", "torchdata": "torchdata.stateful_dataloader"}


class OwnPart(IterableDataset):
    """Every n-th number, from that of this rank."""

    def __iter__(self) -> Iterator[int]:
        several = dist.is_initialized()
        first, step = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        return iter(range(first, COUNT, step))


def stream(kind: str, folder: Path) -> Any:
    """Return a stream of the numbers from 0 to 23 by a library, as a user makes it."""
    if kind.startswith("datasets"):
        from datasets import Dataset

        data = Dataset.from_dict({"x": list(range(COUNT))}).to_iterable_dataset(num_shards=3)
        if kind.endswith("shuffled"):
            data = data.shuffle(seed=3, buffer_size=8)
        return data.with_format("torch")
    if kind == "webdataset":
        import webdataset

        shards = [str(path) for path in sorted(folder.glob("*.tar"))]
        data = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None)
        return data.compose(webdataset.detshuffle(8, seed=1)).decode().to_tuple("cls")
    if kind == "torchdata":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(range(COUNT), batch_size=2, shuffle=True)
    if kind == "torch":
        data = OwnPart()
    elif kind == "litdata":
        import litdata

        data = litdata.StreamingDataset(str(folder / kind), shuffle=True, drop_last=False)
    else:
        import streaming

        data = streaming.StreamingDataset(local=str(folder / kind), shuffle=True, batch_size=2)
    return Loader(data, sharded=True)


def write(kind: str, folder: Path) -> None:
    """Write the numbers as the library of a stream reads them, in several shards."""
    if kind == "litdata":
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(folder / kind), chunk_size=4)
        for number in range(COUNT):
            writer[number] = number
        writer.done()
        writer.merge()
        return
    if kind == "streaming":
        import streaming

        out = {"out": str(folder / kind), "columns": {"x": "int"}, "size_limit": 200}
        with streaming.MDSWriter(**out) as writer:
            for number in range(COUNT):
                writer.write({"x": number})
        return
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(8 * shard, 8 * shard + 8):
                about = tarfile.TarInfo(f"{number:03}.cls")
                about.size = len(text := str(number).encode())
                archive.addfile(about, io.BytesIO(text))


class Seen(Task):
    """Keeps which samples it was given."""

    def __init__(self, kind: str, folder: str) -> None:
        super().__init__()
        self.kind, self.folder, self.seen = kind, folder, []
        self.net = nn.Linear(1, 1)

    def train_step(self, batch: Any) -> Any:
        x = batch["x"] if isinstance(batch, dict) else batch
        x = x[0] if isinstance(x, (list, tuple)) else x
        self.seen.append([int(value) for value in x])
        return self.net(x.float().reshape(-1, 1)).square().mean()

    def optimizers(self) -> Any:
        return SGD(lr=1e-4)

    def train_data(self) -> Any:
        return stream(self.kind, Path(self.folder))


def read(kind: str, folder: str, run_dir: str, stop: int | None = None) -> list[list[int]]:
    """Train two passes, or up to a step; or continue what is in ``run_dir``. Return the batches."""
    task = Seen(kind, folder)
    fit = Fit(
        epochs=2, batch_size=2, run_dir=run_dir, resume="auto", progress=False, loggers=None,
        strategy="ddp", checkpoint=Checkpoint(every="never"),
    )  # fmt: skip
    fit.on("step_end", lambda run, out: run.stop("here") if run.progress.step == stop else None)
    fit.run(task)
    return task.seen

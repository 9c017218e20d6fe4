"""Runs on randomly drawn data: uninterrupted, stopped and resumed, and by a loop without loopkit."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from loopkit import Hook, Loader, Task
from loopkit.optim import SGD
from loopkit.rng import at_step, mix
from tests.support import digest, quiet

SEED, LR, WIDTH = 3, 0.05, 4
TABLE = torch.randn(200, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """A drawn run. ``count`` is the length of the data in epoch 0, ``wrong`` an error of its len()."""

    kind: str
    count: int
    batch_size: int
    accumulate: int
    epochs: int
    shuffle: bool
    workers: int
    wrong: int
    stop: float
    ranks: int


def draw(number: int, ranks: int = 1) -> Case:
    """Return the case of a number."""
    random = Random(number)
    return Case(
        kind=random.choice(sorted(KINDS)),
        count=random.randint(4, 23),
        batch_size=random.randint(1, 5),
        accumulate=random.randint(1, 3),
        epochs=random.randint(1, 3),
        shuffle=random.random() < 0.5,
        workers=random.choice((0, 0, 2)),
        wrong=random.randint(-3, 5),
        stop=random.random(),
        ranks=ranks,
    )


def sample(index: int) -> dict[str, torch.Tensor]:
    return {"id": torch.as_tensor(index), "x": TABLE[index]}


def stack(ids: Any) -> dict[str, torch.Tensor]:
    ids = torch.as_tensor(list(ids))
    return {"id": ids, "x": TABLE[ids]}


class Samples(Dataset):
    """A dataset whose length changes by ``step`` from epoch to epoch."""

    def __init__(self, count: int, step: int = 0) -> None:
        self.first, self.step, self.epoch = count, step, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.first + self.step * self.epoch)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return sample(index)


class Stream(IterableDataset):
    """Samples that workers share out, with a length that is a guess."""

    def __init__(self, case: Case) -> None:
        self.count, self.guess = case.count, max(1, case.count + case.wrong)

    def __len__(self) -> int:
        return self.guess

    def __iter__(self) -> Any:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(sample, range(first, self.count, every))


class Buckets:
    """A batch sampler with an order of each epoch, and a length that is a guess."""

    def __init__(self, case: Case) -> None:
        self.case, self.epoch = case, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.case.count + self.case.wrong)

    def __iter__(self) -> Any:
        order = list(range(self.case.count))
        Random(self.epoch).shuffle(order)
        sizes, start = Random(self.epoch + 50), 0
        while start < len(order):
            size = sizes.randint(1, self.case.batch_size)
            yield order[start : start + size]
            start += size


class Stateful:
    """An iterable of batches that tells and takes its position."""

    def __init__(self, case: Case) -> None:
        self.batches, self.at = ragged(case), 0

    def __iter__(self) -> Any:
        start, self.at = self.at, 0
        for number in range(start, len(self.batches)):
            self.at = (number + 1) % len(self.batches)
            yield self.batches[number]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def ragged(case: Case) -> list[Any]:
    """Return batches of different sizes."""
    return [stack(ids) for ids in Buckets(case)]


@dataclass(frozen=True)
class Sheaf:
    """A batch as an object, in the manner of graphs and images of several sizes."""

    id: torch.Tensor
    x: torch.Tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return getattr(self, name)


def objects(case: Case) -> list[Any]:
    """Return batches of different sizes, as objects."""
    return [Sheaf(**batch) for batch in ragged(case)]


def loader(case: Case, data: Any) -> Loader:
    return Loader(data, case.batch_size, shuffle=case.shuffle, num_workers=case.workers)


def dataloader(case: Case, data: Any) -> DataLoader[Any]:
    return DataLoader(data, case.batch_size, num_workers=case.workers)


KINDS: dict[str, Any] = {
    "dataset": lambda case: loader(case, Samples(case.count)),
    "growing": lambda case: loader(case, Samples(case.count, 3)),
    "shrinking": lambda case: loader(case, Samples(case.count, -2)),
    "stream": lambda case: dataloader(case, Stream(case)),
    "batch sampler": lambda case: DataLoader(Samples(case.count), batch_sampler=Buckets(case)),
    "stateful": Stateful,
    "batches": ragged,
    "objects": objects,
    "collated": lambda case: Loader(
        Samples(case.count),
        case.batch_size,
        shuffle=case.shuffle,
        num_workers=case.workers,
        collate_fn=lambda samples: Sheaf(**stack(each["id"] for each in samples)),
    ),
}


class Fed(Task):
    """A linear model, with noise from torch's generator on one rank."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.weight = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

    def train_step(self, batch: Any) -> Any:
        return loss_of(self.weight, batch["x"], noisy=self.case.ranks == 1)

    def eval_step(self, batch: Any) -> Any:
        return {"loss": loss_of(self.weight, batch["x"], noisy=False)}

    def predict_step(self, batch: Any) -> Any:
        ids = batch["id"].tolist()
        return {
            "id": batch["id"],
            "texts": [str(index) for index in ids],
            "boxes": [torch.full((index % 3, 4), float(index)) for index in ids],
            "nested": ({"pair": [(index, None) for index in ids]}, batch["x"].numpy()),
            "images": tuple(torch.full((7 + index % 3,), index) for index in ids),
            "ragged": torch.stack([torch.tensor([ids[0]] * (1 + ids[0] % 3))] * len(ids)),
        }

    def optimizers(self) -> Any:
        return SGD(lr=LR)

    def train_data(self) -> Any:
        return KINDS[self.case.kind](self.case)

    def eval_data(self) -> Any:
        return Samples(self.case.count + 1)

    def predict_data(self) -> Any:
        return Samples(self.case.count + 1)


def loss_of(weight: torch.Tensor, x: torch.Tensor, *, noisy: bool) -> torch.Tensor:
    noise = torch.randn(len(x), dtype=torch.float64) if noisy else 0.0
    return (x @ weight - 1 + noise).square().mean()


class Reads(Hook):
    """Notes the samples of each step on this rank, and stops after a step."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.steps = stop, []

    def on_step_start(self, run: Any, batches: Any) -> None:
        real = (batch for batch, size in zip(batches, batches.sizes) if size)
        self.steps.append([index for batch in real for index in batch["id"].tolist()])

    def on_step_end(self, run: Any, out: Any) -> None:
        if run.progress.step == self.stop:
            run.stop("enough")


def by_loopkit(case: Case, run_dir: Path, stop: int | None = None) -> dict[str, Any]:
    """Run or resume; return everything that must not depend on where the run was stopped."""
    task, reads = Fed(case), Reads(stop)
    fit = quiet(
        strategy="single" if case.ranks == 1 else "ddp",
        epochs=case.epochs,
        batch_size=case.batch_size,
        accumulate=case.accumulate,
        seed=SEED,
        log_every="2 steps",
        eval_every="3 steps",
        checkpoint=True,
        run_dir=run_dir,
        resume="auto",
        hooks=[reads],
    )
    result = fit.run(task)
    rows = [
        {name: value for name, value in row.items() if "second" not in name and "time" not in name}
        for row in result.history
    ]
    return {
        "read": reads.steps,
        "status": result.status,
        "epoch": result.epoch,
        "weights": digest(task.state_dict()),
        "rows": rows,
        "predictions": fit.predict(task) if stop is None else None,
        "weight": task.weight.detach().clone(),
    }


def passes(case: Case) -> list[list[Any]]:
    """Return the micro-batches of each epoch, as torch alone reads them."""
    found = []
    for epoch in range(case.epochs):
        data = KINDS[case.kind](case)
        if isinstance(data, Loader):
            data.dataset.set_epoch(epoch)
            generator = torch.Generator().manual_seed(mix(SEED, epoch))
            count = len(data.dataset)
            order = torch.randperm(count, generator=generator) if case.shuffle else range(count)
            data = DataLoader(
                data.dataset, case.batch_size, sampler=order, collate_fn=data.collate_fn
            )
        elif case.kind == "batch sampler":
            data.batch_sampler.set_epoch(epoch)
        found.append(list(data))
    return found


def by_hand(case: Case) -> tuple[torch.Tensor, list[list[int]], float]:
    """Train with torch alone; return the weight, the samples of each step, and the last eval/loss."""
    weight = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    width, read = case.accumulate * case.ranks, []
    for batches in passes(case):
        for start in range(0, len(batches), width):
            group = batches[start : start + width]
            samples = sum(len(batch["id"]) for batch in group)
            weight.grad = None
            for index, batch in enumerate(group):
                torch.manual_seed(at_step(SEED, len(read), index))
                loss = loss_of(weight, batch["x"], noisy=case.ranks == 1)
                (loss * (len(batch["id"]) / samples)).backward()
            read.append([index for batch in group for index in batch["id"].tolist()])
            with torch.no_grad():
                weight -= LR * weight.grad
    with torch.no_grad():
        return weight, read, float(loss_of(weight, TABLE[: case.count + 1], noisy=False))


def check(number: int, run_dirs: Path, ranks: int = 1) -> list[str]:
    """Compare the three runs of a case; return what differs."""
    case = draw(number, ranks)
    weight, read, eval_loss = by_hand(case)
    stop = 1 + int(case.stop * (len(read) - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # guesses of lengths are warned of: test_passes.py
        whole = by_loopkit(case, run_dirs / f"{number}-whole")
        first = by_loopkit(case, run_dirs / f"{number}-stopped", stop)
        rest = by_loopkit(case, run_dirs / f"{number}-stopped")
    faults = []

    def expect(what: str, found: Any, right: Any) -> None:
        if found != right:
            faults.append(f"{number} {case} stopped at {stop}: {what} {found} != {right}")

    if len(read) > 1 and stop < len(read):
        expect("samples after the resume", first["read"] + rest["read"], whole["read"])
        expect("rows", first["rows"] + rest["rows"], whole["rows"])
    for name in ("weights", "epoch", "status"):
        expect(name, rest[name], whole[name])
    expect("epoch", whole["epoch"], case.epochs)
    if ranks == 1:
        expect("samples", whole["read"], read)
    if not torch.allclose(whole["weight"], weight.detach(), rtol=1e-10, atol=1e-12):
        expect("weight", whole["weight"], weight)
    measured = [row["eval/loss"] for row in whole["rows"] if "eval/loss" in row][-1]
    if abs(measured - eval_loss) > 1e-10 * max(1.0, abs(eval_loss)):
        expect("eval/loss", measured, eval_loss)
    ids = list(range(case.count + 1))
    expect("predicted", whole["predictions"]["id"].tolist(), ids)
    expect("texts", whole["predictions"]["texts"], list(map(str, ids)))
    boxes = [(len(box), float(box.sum())) for box in whole["predictions"]["boxes"]]
    expect("boxes", boxes, [(i % 3, 4.0 * i * (i % 3)) for i in ids])
    pairs, rows = whole["predictions"]["nested"]
    expect("pairs", pairs["pair"], [(i, None) for i in ids])
    images = [image.tolist() for image in whole["predictions"]["images"]]
    expect("images", images, [[i] * (7 + i % 3) for i in ids])
    expect("rows", torch.equal(torch.as_tensor(rows), TABLE[: len(ids)]), True)
    firsts = [i - i % case.batch_size for i in ids]  # of the batch of each sample
    found = [row[row != -100].tolist() for row in whole["predictions"]["ragged"]]
    expect("ragged", found, [[first] * (1 + first % 3) for first in firsts])
    return faults


def check_all(numbers: list[int], ranks: int) -> list[str]:
    """Check several cases; called on each rank."""
    faults: list[str] = []
    for number in numbers:
        faults += check(number, shared_directory(), ranks)
    return faults


def shared_directory() -> Path:
    """Return a new directory that all ranks agree on."""
    import torch.distributed as dist

    names = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(names)
    return Path(names[0])

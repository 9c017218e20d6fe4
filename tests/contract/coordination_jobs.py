"""Jobs in which ranks must come to the same decision."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loopkit import Checkpoint, Hook
from loopkit.strategies.dtensor import full_tensor
from tests.contract.jobs import make
from tests.support import Tiny, digest, quiet


class Notes(Hook):
    """Keeps what happened, as (event, step)."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, int]] = []

    def on_eval_end(self, run: Any, metrics: Any) -> None:
        self.notes.append(("eval", run.progress.step))

    def on_save(self, run: Any, path: Path) -> None:
        self.notes.append(("save", int(path.name.split("-")[1])))

    def on_log(self, run: Any, values: Any) -> None:
        self.notes.append(("log", run.progress.step))

    def on_epoch_end(self, run: Any) -> None:
        self.notes.append(("end_epoch", run.progress.step))

    def on_fit_end(self, run: Any) -> None:
        self.notes.append(("fit_end", run.progress.step))


def asks(what: str, rank: int, place: Path) -> dict[str, Any]:
    """Rank ``rank`` asks for ``what`` at the end of step 3."""
    notes = Notes()
    save = Checkpoint(every="never", background=False)
    fit = quiet(
        strategy="ddp",
        batch_size=4,
        epochs=1,
        eval_every="never" if what != "eval" else "1000 steps",
        log_every="1000 steps",
        hooks=[notes],
        checkpoint=save,
        run_dir=place,
    )

    @fit.on("step_end")
    def ask(run: Any, out: Any) -> None:
        if run.progress.step == 3 and run.strategy.rank == rank:
            run.stop(f"rank {rank} has seen enough") if what == "stop" else run.request(what)

    result = fit.run(Tiny())
    seen = "fit_end" if what == "stop" else what
    return {
        "notes": notes.notes,
        "done": (seen, 3) in notes.notes,
        "result": (result.status, result.reason, result.step),
    }


def asks_after_evaluation(place: Path) -> tuple[str, str, int]:
    """Rank 1 alone stops the run after the evaluation at step 4."""
    fit = quiet(
        strategy="ddp", batch_size=4, epochs=2, eval_every="4 steps", checkpoint=True, run_dir=place
    )
    fit.on(
        "eval_end", lambda run, metrics: run.stop("good enough") if run.strategy.rank == 1 else None
    )
    result = fit.run(Tiny())
    return result.status, result.reason, result.step


class Odd(Tiny):
    """Logs a name of its own on odd ranks."""

    def train_step(self, batch: Any) -> Any:
        if dist.get_rank() == 1:
            self.log("odd", 1.0)
        return super().train_step(batch)


def logs() -> dict[str, float]:
    """Each rank logs a name of its own, and one in common."""
    fit = quiet(strategy="ddp", batch_size=4, steps=5, log_every=5, eval_every="never")

    @fit.on("step_end")
    def log(run: Any, out: Any) -> None:
        run.log(
            {f"own/{run.strategy.rank}": 10.0 + run.strategy.rank, "both": float(run.strategy.rank)}
        )

    return fit.run(Odd()).history[-1]


class Broken(Tiny):
    """Gives a value that is not finite at step 3 on one rank."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__(dropout=0.0)
        self.rank, self.how, self.calls = rank, how, 0

    def train_step(self, batch: Any) -> Any:
        self.calls += 1
        loss = super().train_step(batch)
        if self.calls != 3 or dist.get_rank() != self.rank:
            return loss
        if self.how == "infinite":  # with a gradient that is finite
            return loss + float("inf")
        if self.how == "gradient":
            return loss + (self.net[0].weight * 0).sum().sqrt()
        return loss * float("nan")


def not_finite(
    rank: int, how: str, on_nan: str, precision: str, strategy: Any = "ddp"
) -> tuple[Any, Any]:
    """What was raised and whether a weight changed since step 2; under "skip", how many steps were,
    and the end.
    """
    task, weights = Broken(rank, how), {}
    fit = quiet(
        strategy=make(strategy),
        batch_size=4,
        epochs=1,
        on_nan=on_nan,
        precision=precision,
        log_every=1,
        eval_every="never",
    )

    @fit.on("step_end")
    def keep(run: Any, out: Any) -> None:
        if run.progress.step == 2:
            weights.update({name: t.clone() for name, t in task.state_dict().items()})

    try:
        result = fit.run(task)
    except ArithmeticError as error:
        return str(error), any(
            not torch.equal(t, weights[name]) for name, t in task.state_dict().items()
        )
    skipped = sum(row.get("train/skipped_steps", 0) for row in result.history)
    return skipped, digest({name: full_tensor(t) for name, t in task.state_dict().items()})


def timed() -> int:
    """Ranks with clocks that run differently stop at the same step."""
    fit = quiet(strategy="ddp", batch_size=1, epochs=1000, time=0.5, eval_every="never")
    fit.on("step_end", lambda run, out: time.sleep(0.002 * run.strategy.rank))
    return fit.run(Tiny()).step


def clocked() -> tuple[float, int, int]:
    """A run of 2 seconds that logs every half second, with nobody who might ask for anything: time,
    steps and logs.
    """
    notes, seen = Notes(), []

    class Slow(Tiny):
        def train_step(self, batch: Any) -> Any:
            time.sleep(0.005)
            return super().train_step(batch)

    fit = quiet(
        strategy="ddp",
        batch_size=1,
        epochs=1000,
        time=2,
        log_every="0.5 s",
        eval_every="never",
        hooks=[notes],
    )
    fit.on("fit_end", lambda run: seen.append(run.progress.seconds))
    step = fit.run(Slow()).step
    return seen[0], step, len([what for what, _ in notes.notes if what == "log"])


def bad_directory(place: Path) -> str:
    """The run directory cannot be made, which only the first rank tries."""
    try:
        quiet(strategy="ddp", run_dir=place).run(Tiny())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def saves(place: Path) -> list[tuple[str, int]]:
    """Saves in the background every other step."""
    notes = Notes()
    quiet(
        strategy="ddp",
        batch_size=4,
        epochs=1,
        eval_every="never",
        log_every="never",
        hooks=[notes],
        run_dir=place,
        checkpoint=Checkpoint(every="2 steps"),
    ).run(Tiny())
    return [note for note in notes.notes if note[0] in ("save", "fit_end")]


def other_directories(place: Path) -> str:
    """The first rank resumes from a directory that the others do not have."""
    rank = int(os.environ["RANK"])
    mine = place / "run"
    fit = quiet(strategy="ddp", batch_size=4, steps=2, checkpoint=True, run_dir=mine)
    fit.run(Tiny())
    if rank == 1:
        import loopkit.fit.checkpointer

        kept, loopkit.fit.checkpointer.load_snapshot = (
            loopkit.fit.checkpointer.load_snapshot,
            lambda path, store: kept(place / "nowhere", store),
        )
    try:
        quiet(
            strategy="ddp", batch_size=4, steps=4, checkpoint=True, run_dir=mine, resume="auto"
        ).run(Tiny())
    except Exception as error:
        return str(error)
    finally:
        if rank == 1:
            loopkit.fit.checkpointer.load_snapshot = kept
    return ""


def disk_full(place: Path) -> str:
    """The first rank's disk is full at the second save, in the background."""
    from loopkit.checkpoint.store import Store
    from loopkit.errors import DiskFullError

    kept, calls = Store.create, [0]

    def create(self: Any, path: Path, *rest: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] > 4:
            raise DiskFullError(errno.ENOSPC, "no space", str(path))
        return kept(self, path, *rest, **more)

    Store.create = create  # type: ignore[method-assign]
    try:
        quiet(
            strategy="ddp",
            batch_size=4,
            epochs=3,
            checkpoint=Checkpoint(every="2 steps"),
            run_dir=place,
        ).run(Tiny())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Store.create = kept  # type: ignore[method-assign]
    return ""


def signal_after(rank: int, moment: int) -> tuple[str, int]:
    """SIGTERM comes to one rank right after its word number ``moment``: too late for the others to
    have heard of it.
    """
    import signal

    from loopkit.distributed.communicator import ProcessGroupCommunicator

    kept, words, seen = ProcessGroupCommunicator.all_reduce_sum, [0], [0]

    def add(self: Any, *numbers: float) -> list[float]:
        sums = kept(self, *numbers)
        words[0] += 1
        if words[0] == moment and self.rank == rank:
            signal.raise_signal(signal.SIGTERM)
        return sums

    ProcessGroupCommunicator.all_reduce_sum = add  # type: ignore[method-assign]
    fit = quiet(strategy="ddp", batch_size=4, epochs=2, eval_every="3 steps", log_every="3 steps")
    fit.on(
        "step_end", lambda run, out: seen.__setitem__(0, run.progress.step)
    )  # it might ask: a word before each step
    try:
        return fit.run(Tiny()).status, seen[0]
    except SystemExit as error:
        return f"exit {error.code}", seen[0]
    finally:
        ProcessGroupCommunicator.all_reduce_sum = kept  # type: ignore[method-assign]


class Counts(Hook):
    """Sees each step; ``steers`` says whether it might ask for anything."""

    def __init__(self, may_request: bool) -> None:
        self.may_request, self.steps = may_request, 0

    def on_step_end(self, run: Any, out: Any) -> None:
        self.steps += 1


class Spoken(Tiny):
    """Samples with as many tokens as their number says."""

    def train_data(self) -> Any:
        return [
            {"input_ids": torch.ones(2, 1 + n % 3, dtype=torch.long), "x": torch.ones(2, 8)}
            for n in range(41)
        ]

    def train_step(self, batch: Any) -> Any:
        return self.net(batch["x"]).square().mean()


def words(may_request: bool, **options: Any) -> tuple[int, int, int, int]:
    """How many sums over the ranks a run of 21 steps takes where a second is never over; tokens at
    its end.
    """
    from loopkit.distributed.communicator import ProcessGroupCommunicator
    from loopkit.loops import coordination

    kept, count, spacing = ProcessGroupCommunicator.all_reduce_sum, [0], coordination.SYNC_INTERVAL
    coordination.SYNC_INTERVAL = 1e9

    def add(self: Any, *numbers: float) -> list[float]:
        count[0] += 1
        return kept(self, *numbers)

    ProcessGroupCommunicator.all_reduce_sum = add  # type: ignore[method-assign]
    counts, said = Counts(may_request), []
    fit = quiet(
        strategy="ddp",
        epochs=1,
        eval_every="never",
        hooks=[counts],
        **{"log_every": "never", **options},
    )
    fit.on("fit_end", lambda run: said.append((run.progress.tokens, run.progress.samples)))
    try:
        fit.run(Spoken())
        return count[0], counts.steps, *said[0]
    finally:
        ProcessGroupCommunicator.all_reduce_sum, coordination.SYNC_INTERVAL = kept, spacing  # type: ignore[method-assign]


def signal_between_words(rank: int, at: int, place: Path) -> tuple[str, list[int]]:
    """SIGTERM comes to one rank at the end of step ``at`` of a run whose ranks speak now and then."""
    import signal

    class Struck(Counts):
        def on_step_end(self, run: Any, out: Any) -> None:
            super().on_step_end(run, out)
            time.sleep(0.02)
            if self.steps == at and run.strategy.rank == rank:
                signal.raise_signal(signal.SIGTERM)

    struck = Struck(may_request=False)
    fit = quiet(
        strategy="ddp",
        batch_size=1,
        epochs=100,
        eval_every="never",
        log_every="never",
        hooks=[struck],
        checkpoint=Checkpoint(every="never"),
        run_dir=place,
    )
    try:
        return fit.run(Tiny()).status, []
    except SystemExit as error:
        return f"exit {error.code}", sorted(
            int(path.name.split("-")[1]) for path in (place / "checkpoints").glob("step-*")
        )

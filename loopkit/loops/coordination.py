"""Coordination: requests of one rank become actions of all ranks at the same step."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

from loopkit import rng
from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import DataError
from loopkit.events import listens
from loopkit.loops.step import StepLoop
from loopkit.run import Run
from loopkit.strategies.base import Strategy

# "clock" is rank 0's request to look at the cadences that count seconds.
REQUESTS = ("stop", "save", "eval", "log", "end_epoch", "clock")
SYNC_INTERVAL = 1.0
_WITHIN_A_STEP = (
    "epoch_start", "step_start", "micro_step_end", "before_update", "step_end", "commit",
)  # fmt: skip


class Coordinator:
    """The requests of a run with one process: each takes effect at once.

    Attributes:
        requested_end: the status and reason of an end that this rank requested; None for none.
        next_sync: the first step before which the ranks exchange control messages.
    """

    distributed = False

    def __init__(self) -> None:
        self.requested_end: tuple[str, str] | None = None
        self.next_sync = 0

    def request(self, run: Run, what: str) -> None:
        """Request an action after this step."""
        run.triggers.request(what)

    def request_end(self, run: Run, status: str, reason: str) -> None:
        """Request the end of the run after this step."""
        self.requested_end = first_end([self.requested_end, (status, reason)])
        run.outcome.status, run.outcome.reason = self.requested_end
        self.request(run, "stop")

    def start_epoch(self, run: Run) -> None:
        """Prepare for the steps of one pass over the data."""

    def before_fetch(self, run: Run) -> bool:
        """Return whether a signal may end the wait for the next batches."""
        return True

    def before_step(
        self, run: Run, batches: MicroBatches | None, last: MicroBatches | None
    ) -> MicroBatches | None:
        """Agree on the next step; see ``RankCoordinator.before_step``."""
        return batches

    def interrupts_evaluation(self, run: Run, *, alike: bool = True) -> bool:
        """Return whether a signal ends the evaluation before its next batch.

        Args:
            run: the run.
            alike: whether all ranks make this call before as many batches.
        """
        return run.outcome.status == "interrupted"

    def sync(self, run: Run) -> bool:
        """Make all requests known to all ranks.

        Returns:
            Whether any rank has values to log.
        """
        return len(run.accumulator) > 0


class RankCoordinator(Coordinator):
    """The requests of a run with several ranks: each takes effect when all ranks know it.

    A signal can come between a control message and its use. Until the next message, a request
    changes nothing on the rank that made it; otherwise this rank would stop and the others would
    continue. A control message is one all_reduce of a few numbers over the CPU.
    """

    distributed = True

    def __init__(self) -> None:
        super().__init__()
        self._local: set[str] = set()  # the requests that the other ranks do not know
        self._rarely = False  # whether one message a second is enough
        self._tokens = 0  # the tokens of this rank that the other ranks do not know
        self._step = 0
        self._time: float | None = None
        # Of evaluations: batches since the last message, until the next one, and its time.
        self._batches, self._next_message, self._message_at = 0, 0, 0.0

    def request(self, run: Run, what: str) -> None:
        """Request an action after the step that follows the next control message."""
        self._local.add(what)

    def request_end(self, run: Run, status: str, reason: str) -> None:
        """Request the end of the run; the status is set when all ranks know it."""
        self.requested_end = first_end([self.requested_end, (status, reason)])
        self.request(run, "stop")

    def start_epoch(self, run: Run) -> None:
        """Find out whether the ranks may exchange messages once a second in this pass."""
        self._rarely = _may_sync_rarely(run)

    def before_fetch(self, run: Run) -> bool:
        """Return whether a signal may interrupt the wait for the next batches.

        It may where a control message follows; otherwise the others would continue without this
        rank. Requests that this message brings are met after the fetch, and a checkpoint must then
        hold the random state from before it.
        """
        syncs = run.progress.step >= self.next_sync
        if syncs and run.seed is None:
            run.committed.rng_state = rng.get_state(run.strategy.device)
        return syncs

    def before_step(
        self, run: Run, batches: MicroBatches | None, last: MicroBatches | None
    ) -> MicroBatches | None:
        """Exchange requests, and the sizes of the batches at hand, where a message is due.

        The exchange is here and not after a step, since a rank can get a signal while it waits for
        data.

        Args:
            run: the run.
            batches: this rank's next micro-batches; None when it has no more.
            last: its last ones, which make a dummy batch when other ranks continue.

        Returns:
            The micro-batches to train on, with their totals over all ranks; None when no rank has
            any.

        Raises:
            DataError: the other ranks have data, and this rank never had any.
        """
        if run.progress.step < self.next_sync:
            if batches is not None:
                self._tokens += batches.tokens
                batches.tokens = 0
            return batches
        leader, rank_zero = run.strategy.dp.is_group_leader, run.strategy.rank == 0
        seconds_left = run.triggers.next_deadline - run.seconds()
        if rank_zero and seconds_left <= 0:
            self.request(run, "clock")
        own = (0, 0, 0)
        if batches is not None and leader:
            own = (1, batches.samples, batches.tokens)
        steps = self._steps_until_sync(run, seconds_left) if self._rarely and rank_zero else 0
        sums = self._reduce_requests(run, *own, self._pop_tokens(leader), steps)
        ranks, samples, tokens, earlier_tokens, steps = map(int, sums)
        self.next_sync = run.progress.step + steps
        run.progress.tokens += earlier_tokens
        if run.train_loader.source.uneven and ranks > 0 and not run.triggers.is_requested("stop"):
            batches = _pad_with_dummies(run, batches, last)
        if batches is not None:
            batches.total, batches.tokens = samples, tokens
        return batches

    def interrupts_evaluation(self, run: Run, *, alike: bool = True) -> bool:
        """Return whether a signal to any rank ends the evaluation before its next batch.

        The ranks exchange a control message about once a second, before the same batch.
        """
        if alike:
            self._batches += 1
            if self._batches >= self._next_message:
                now = perf_counter()
                seconds, began, self._message_at = now - self._message_at, self._message_at, now
                pace = self._batches / max(seconds, 1e-9) if began else 0.0
                own = max(1, int(pace * SYNC_INTERVAL)) if run.strategy.rank == 0 else 0
                self._batches, self._next_message = 0, int(self._reduce_requests(run, own)[0])
        return run.outcome.status == "interrupted"

    def sync(self, run: Run) -> bool:
        """Make all requests known to all ranks, and set the clock to that of rank 0.

        Returns:
            Whether any rank has values to log.
        """
        seconds = run.progress.seconds if run.strategy.rank == 0 else 0.0
        tokens = self._pop_tokens(run.strategy.dp.is_group_leader)
        sums = self._reduce_requests(run, len(run.accumulator), seconds, tokens)
        values, run.progress.seconds, tokens = sums[0], sums[1], int(sums[2])
        run.progress.tokens += tokens
        return values > 0

    def _reduce_requests(self, run: Run, *numbers: float) -> list[float]:
        """Send this rank's requests to all ranks; return the sums of ``numbers`` over the ranks."""
        world = run.strategy.world
        local = set(self._local)
        self._local -= local  # a signal may add to it at any moment
        sums = world.all_reduce_sum(*(float(what in local) for what in REQUESTS), *numbers)
        requested = [what for what, count in zip(REQUESTS, sums) if count]
        for what in requested:
            run.triggers.request(what)
        if "stop" in requested:
            # Only the rank that requested the stop knows its reason.
            ends = world.all_gather_object(self.requested_end)
            run.outcome.status, run.outcome.reason = first_end([*ends, ("stopped", "")])
        return sums[len(REQUESTS) :]

    def _pop_tokens(self, leader: bool) -> int:
        tokens, self._tokens = self._tokens, 0
        return tokens if leader else 0

    def _steps_until_sync(self, run: Run, seconds_left: float) -> int:
        """Return how many steps take about a second, judged by those since the last message."""
        now, step = perf_counter(), run.progress.step
        began, steps = self._time, step - self._step
        self._step, self._time = step, now
        if began is None or steps < 1:
            return 1
        seconds = min(SYNC_INTERVAL, seconds_left)
        return max(1, int(seconds * steps / max(now - began, 1e-9)))


def first_end(ends: Iterable[tuple[str, str] | None]) -> tuple[str, str]:
    """Return the end that counts: by a signal other than Ctrl-C, by Ctrl-C, or else the first.

    Whoever sent a SIGTERM waits for its exit code, whatever else asks for an end meanwhile.
    """
    known = [end for end in ends if end is not None]
    return min(known, key=lambda end: (end[0] != "interrupted", end[1] == "SIGINT"))


def build_coordinator(strategy: Strategy) -> Coordinator:
    """Return the coordinator for as many ranks as the strategy has."""
    return RankCoordinator() if strategy.world_size > 1 else Coordinator()


def _may_sync_rarely(run: Run) -> bool:
    """Return whether one control message a second is enough.

    It is where only signals can make requests within a step, and where each rank knows how much
    data the others have.
    """
    listeners: list[Any] = [run.task, *run.hooks]
    requesting = [each for each in listeners if getattr(each, "may_request", True)]
    heard = any(listens(each, event) for each in requesting for event in _WITHIN_A_STEP)
    known = run.train_loader.source.end() is not None
    return type(run.loops.step) is StepLoop and not heard and known


def _pad_with_dummies(
    run: Run, batches: MicroBatches | None, last: MicroBatches | None
) -> MicroBatches:
    """Return as many micro-batches as the other ranks have; a dummy batch has the size 0."""
    accumulate = run.train_loader.accumulate
    if batches is not None:
        return batches.padded(accumulate)
    if last is None:
        raise DataError(
            f"the other ranks have training data and rank {run.strategy.rank} has none: give each "
            "some, or leave out Loader(sharded=True) to have one stream dealt out to all"
        )
    return last.dummies(accumulate)

"""Joint decisions: what one rank asks for, all ranks do at the same step."""

from __future__ import annotations

from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import DataError
from loopkit.events import listens
from loopkit.loops.step import StepLoop
from loopkit.run import Run

ASKS = ("stop", "save", "eval", "log", "end_epoch", "clock")
_WITHIN = ("epoch_start", "step_start", "micro_step_end", "before_update", "step_end", "commit")


def _ask_all(run: Run, *numbers: float) -> list[float]:
    """Make every rank's requests everyone's; the sums of what else each says. One small sum over
    all ranks.
    """
    agenda, world = run.triggers, run.strategy.world
    wishes = agenda.pop_local_requests()
    sums = world.all_reduce_sum(*(float(what in wishes) for what in ASKS), *numbers)
    for what, count in zip(ASKS, sums):
        if count:
            agenda.confirm(what)
    if sums[0]:  # a stop has a reason, which only the rank that asked may know
        reasons = [
            reason for reason in world.all_gather_object(run.requested_end) if reason is not None
        ]
        run.status, run.reason = reasons[0] if reasons else ("stopped", "")
    return sums[len(ASKS) :]


def spaced(run: Run) -> bool:
    """Whether the ranks may train on for a second without a word.

    They may where no more than signals can ask for anything within a step, and where each knows by
    itself what
    the others have: how much, and until when.
    """
    feed = run.train_loader
    assert feed is not None
    steering = [who for who in (run.task, *run.hooks) if getattr(who, "steers", True)]
    heard = any(listens(who, event) for who in steering for event in _WITHIN)
    return type(run.loops.step) is StepLoop and not heard and feed.source.end() is not None


def agree(run: Run) -> bool:
    """Have all ranks know of all requests, and go by the first one's clock.

    Returns:
        Whether any rank has collected something to log.
    """
    collected: float = len(run.accumulator)
    if run.strategy.world_size > 1:
        clock = run.progress.seconds if run.strategy.rank == 0 else 0.0
        late = run.sync_schedule.take_tokens() * run.strategy.dp.is_group_leader
        collected, run.progress.seconds, tokens = _ask_all(run, collected, clock, late)
        run.progress.tokens += int(tokens)
    return collected > 0


def join(run: Run, batches: MicroBatches | None, held: MicroBatches | None) -> MicroBatches | None:
    """Between two steps: where a word is due, have all ranks know of all requests, and of all data
    at hand.

    Here, and not at the end of a step, since a rank may be told to stop while it waits for data.

    Args:
        batches: this rank's next group; None when it has none.
        held: its last group, which stands in when others go on.

    Returns:
        The group to train on, with what all ranks have of it; None when no rank has any.

    Raises:
        DataError: the others have data and this rank never had any.
    """
    words, step = run.sync_schedule, run.progress.step
    if step < words.next:
        if batches is not None:
            words.tokens, batches.tokens = words.tokens + batches.tokens, 0
        return batches
    first, until = run.strategy.rank == 0, run.triggers.next_deadline - run.seconds()
    if first and until <= 0:
        run.triggers.request("clock")  # something is due by the clock, which is the first rank's
    counts = run.strategy.dp.is_group_leader
    mine = (0, 0, 0) if batches is None or not counts else (1, batches.samples, batches.tokens)
    space = words.space(step, until) if words.spaced and first else 0
    ranks, samples, tokens, late, space = map(
        int, _ask_all(run, *mine, words.take_tokens() * counts, space)
    )
    words.next = step + space
    run.progress.tokens += late
    feed = run.train_loader
    assert feed is not None
    if feed.source.uneven and ranks > 0 and not run.triggers.is_requested("stop"):
        batches = _filled(batches, held, feed.accumulate, run.strategy.rank)
    if batches is not None:
        batches.total, batches.tokens = samples, tokens
    return batches


def _filled(
    batches: MicroBatches | None, held: MicroBatches | None, accumulate: int, rank: int
) -> MicroBatches:
    """A group of as many micro-batches as the other ranks': what is missing stands in, and counts
    for nothing.
    """
    last = batches or held
    if last is None:
        raise DataError(
            f"the other ranks have training data and rank {rank} has none: give each some, or "
            f"leave out "
            "Loader(sharded=True) to have one stream dealt out to all"
        )
    group = MicroBatches(last.start if batches else last.end)
    group.extend(batches or ())
    group.sizes = list(batches.sizes) if batches else []
    group.samples = batches.samples if batches else 0
    group.state = last.state
    group.end = group.start + accumulate
    while len(group) < accumulate:
        group.append(last[-1])
        group.sizes.append(0)
    return group

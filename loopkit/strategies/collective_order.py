"""CollectiveOrder: steps that use other parameters on each rank fail before a wrong value is sent.

Sharded training gathers and reduces parameters while a step runs. The ranks' calls are matched by
their order alone. If a step uses one layer on this rank and another layer on that rank, torch mixes
their values, or the process is aborted.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from loopkit.distributed.communicator import Communicator
from loopkit.errors import TaskError

# Seconds that a rank waits for the others to take the same new turn.
_PATIENCE = 20.0

# The event before the first collective of a backward pass.
BACKWARD = ("backward", "")


class CollectiveOrder:
    """The order in which a step's collectives follow each other, which must be that of all ranks.

    A rank remembers what followed what in the passes that all ranks agreed on. A pass that repeats
    them sends nothing. Where the ranks know no successor yet, or several, they compare the next one
    before they continue. Where a rank leaves the only way known, it waits for the others to leave it too.

    Args:
        world: all ranks.
        describe: returns the names of the parameters of an event.
        remedy: ends the error: what the user can do.
        timeout: seconds that a rank waits in a collective.
    """

    def __init__(
        self,
        world: Communicator,
        describe: Callable[[Any], Sequence[str]],
        remedy: str,
        timeout: float,
    ) -> None:
        self._world = world
        self._describe = describe
        self._remedy = remedy
        self._patience = timedelta(seconds=min(_PATIENCE, timeout))
        self._known: dict[Hashable, set[Hashable]] = {}
        self._at: Hashable = None  # the event before, with the kind of pass and how often it came
        self._kind: Hashable = None
        self._visits: dict[Hashable, int] = {}
        self._turns = 0
        self._key = f"loopkit/order/{world.broadcast_object(uuid.uuid4().hex)}"

    def start(self, kind: Hashable) -> None:
        """Begin a pass: a call of a step, or an evaluation. Ends the pass before."""
        self.end()
        self._kind, self._at = kind, (kind, None, 0)

    def end(self) -> None:
        """End the pass; all ranks must end it at the same point."""
        if self._at is not None:
            self.follow(None)
            self._visits.clear()
            self._at = None

    def follow(self, event: Hashable) -> None:
        """Continue with the collective ``event``; None for the end of the pass.

        Raises:
            TaskError: other ranks continue with another one. Names the parameters of each.
        """
        if self._at is None:
            self.start(None)
        known = self._known.setdefault(self._at, set())
        if len(known) != 1:
            self._compare(self._world.all_gather_object(event))
        elif event not in known:
            self._compare(self._meet_others(event))
        known.add(event)
        count = self._visits[event] = self._visits.get(event, 0) + 1
        self._at = (self._kind, event, count)

    def _meet_others(self, event: Hashable) -> list[Any]:
        """Return what each rank continues with, if all of them leave the known way here.

        A rank that stays on it waits in its collective and cannot answer.
        """
        store: Any = dist.distributed_c10d._get_default_store()
        self._turns += 1
        keys = [f"{self._key}/{self._turns}/{rank}" for rank in range(self._world.size)]
        store.set(keys[self._world.rank], json.dumps(self._names(event)))
        with suppress(RuntimeError):
            store.wait(keys, self._patience)
        if not store.check(keys):
            (usual,) = self._known[self._at]
            raise self._error(
                f"rank {self._world.rank} continues with {self._shown(event)}, and other ranks with "
                f"{self._shown(usual)}"
            )
        return [json.loads(store.get(key)) for key in keys]

    def _compare(self, answers: Sequence[Any]) -> None:
        if all(answer == answers[0] for answer in answers):
            return
        other = next(rank for rank, answer in enumerate(answers) if answer != answers[0])
        mine, theirs = (
            answer if isinstance(answer, list) else self._names(answer)
            for answer in (answers[0], answers[other])
        )
        # Of two long lists, what is in one alone; of lists in another order, all.
        own = (
            [name for name in mine[1:] if name not in theirs],
            [name for name in theirs[1:] if name not in mine],
        )
        if any(own) and mine and theirs:
            mine, theirs = [mine[0], *own[0]], [theirs[0], *own[1]]
        raise self._error(
            f"rank 0 continues with {_listed(mine)}, and rank {other} with {_listed(theirs)}"
        )

    def _error(self, what: str) -> TaskError:
        return TaskError(f"a step uses other parameters on each rank: {what}. {self._remedy}")

    def _names(self, event: Any) -> list[str]:
        if event is None or event == BACKWARD:
            return list(event or ())[:1]
        return [event[0], *self._describe(event)]

    def _shown(self, event: Any) -> str:
        return _listed(self._names(event))


def _listed(names: Sequence[str]) -> str:
    """Return the names of an event's parameters as a sentence has them; the kind comes first."""
    if not names:
        return "the end of the pass"
    kind, *parameters = names
    if kind == BACKWARD[0]:
        return "the backward pass"
    more = f" and {len(parameters) - 4} more" if len(parameters) > 4 else ""
    shown = f"{', '.join(parameters[:4])}{more}" if parameters else "none of those"
    return f"the gradients of {shown}" if kind == "reduce" else shown

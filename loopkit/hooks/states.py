"""The states of a run's hooks: what a checkpoint holds of them, from rank 0 or from every rank."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from loopkit.checkpoint.codecs import encode
from loopkit.checkpoint.format import dump_json
from loopkit.distributed.communicator import Communicator
from loopkit.errors import CheckpointError, LoopkitWarning
from loopkit.events import Hook
from loopkit.hooks.state_keys import state_keys
from loopkit.nested import map_instances


def hook_states(hooks: Iterable[Hook], world: Communicator) -> dict[str, Any]:
    """Return the states of ``hooks`` by key. Collective.

    A checkpoint holds the states of rank 0. Of hooks with ``per_rank_state`` it holds, apart from
    them, a list with the state of each rank; None for a rank without such a hook.
    """
    states = {key: (hook, hook.state_dict()) for key, hook in state_keys(hooks).items()}
    own = {key: state for key, (hook, state) in states.items() if hook.per_rank_state}
    common = {key: state for key, (_, state) in states.items() if key not in own}
    each: list[tuple[dict[str, Any], dict[str, str]]] = [(own, {})]
    if world.size > 1:
        each = world.all_gather_object((own, {key: _digest(s) for key, s in common.items()}))
        _warn_of_differences([digests for _, digests in each])
    keys = dict.fromkeys(key for states, _ in each for key in states)
    return {
        "hooks": common,
        "hooks_by_rank": {key: [states.get(key) for states, _ in each] for key in keys},
    }


def own_states(
    hooks: Iterable[Hook], saved: Mapping[str, Any], world: Communicator, source: object
) -> dict[str, Any]:
    """Return by key what this rank's hooks get of what :func:`hook_states` returned.

    A hook without saved state starts fresh.

    Raises:
        CheckpointError: another number of ranks saved the state of a hook with ``per_rank_state``.
    """
    found: dict[str, Any] = {}
    for key in state_keys(hooks):
        by_rank = saved.get("hooks_by_rank", {}).get(key)
        if by_rank is None:
            if key in saved["hooks"]:
                found[key] = saved["hooks"][key]
        elif len(by_rank) != world.size:
            raise CheckpointError(
                f"{source} holds the state of the hook {key} by rank, of {len(by_rank)} ranks, "
                f"which {world.size} cannot resume: start as many ranks as before"
            )
        elif by_rank[world.rank] is not None:
            found[key] = by_rank[world.rank]
    return found


def _digest(state: Any) -> str:
    """Return the same text for the same plain values; the values of tensors do not count."""
    plain = encode(map_instances(Tensor, lambda tensor: "a tensor", state), "state", {})
    return hashlib.sha256(dump_json(plain)).hexdigest()


def _warn_of_differences(each: list[dict[str, str]]) -> None:
    for key in each[0]:
        others = [rank for rank, digests in enumerate(each) if digests.get(key, "") != each[0][key]]
        others = [rank for rank in others if key in each[rank]]
        if others:
            warnings.warn(
                f"the state of the hook {key} on rank {others[0]} is not that of rank 0, and "
                "checkpoints hold that of rank 0 alone. Give the hook's class "
                "per_rank_state = True, which saves the state of each rank, or make it the same",
                LoopkitWarning,
                stacklevel=2,
            )

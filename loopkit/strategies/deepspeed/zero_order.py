"""Where DeepSpeed gathers and reduces parameters in a step: followed, so that the ranks compare it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from loopkit.distributed.communicator import Communicator
from loopkit.strategies.collective_order import CollectiveOrder


def watched_order(
    engine: Any, task: nn.Module, world: Communicator, timeout: float
) -> CollectiveOrder | None:
    """Return the order of the collectives of ``engine``, which it follows from now on.

    Stage 3 gathers the parameters of each module before it runs. All stages collect gradients in
    buckets and reduce a bucket at once.

    Returns:
        None for an engine without a ZeRO optimizer, as it is for evaluation.
    """
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    order = CollectiveOrder(
        world,
        lambda event: [str(name) for name in event[1:]],
        "DeepSpeed gathers parameters, and reduces their gradients, on all ranks in one order. Take "
        "DDP(find_unused_parameters=True), or let every step use them all (add 0 * their output)",
        timeout,
    )
    zero = engine.optimizer
    if hasattr(zero, "bit16_groups"):  # stages 1 and 2

        def in_buckets() -> list[Any]:
            return [
                zero.bit16_groups[group][index]
                for bucket in zero.ipg_buckets.values()
                for group, index, _ in bucket.params
            ]

        _follow_before(zero, "reduce_ipg_grads", order, in_buckets, names)
    elif hasattr(zero, "ipg_buckets"):
        _follow_before(
            zero,
            "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads",
            order,
            lambda: [p for bucket in zero.ipg_buckets.values() for p in bucket.params],
            names,
        )
    offload = getattr(zero, "parameter_offload", zero)
    if hasattr(offload, "get_param_coordinator"):
        _follow_fetches(offload.get_param_coordinator(), order, names)
    return order


def _follow_before(
    owner: Any,
    method: str,
    order: CollectiveOrder,
    parameters: Callable[[], list[Any]],
    names: dict[int, str],
) -> None:
    """Have ``owner`` follow the parameters at hand before each call of a method."""
    inner = getattr(owner, method)

    def followed(*args: Any, **kwargs: Any) -> Any:
        found = [names.get(id(parameter), "") for parameter in parameters()]
        if found:
            order.follow(("reduce", *found))
        return inner(*args, **kwargs)

    setattr(owner, method, followed)


def _follow_fetches(coordinator: Any, order: CollectiveOrder, names: dict[int, str]) -> None:
    inner = coordinator.fetch_sub_module

    def fetch(module: nn.Module, forward: bool) -> Any:
        found = [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]
        if found:
            order.follow(("gather", *found))
        return inner(module, forward)

    coordinator.fetch_sub_module = fetch

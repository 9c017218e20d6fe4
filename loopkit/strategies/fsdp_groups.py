"""What FSDP's groups of parameters do in a step: which are used on this rank, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.distributed.communicator import Communicator
from loopkit.strategies.collective_order import CollectiveOrder


class FsdpGroups:
    """Watches the groups in which fully_shard gathers parameters and reduces gradients.

    torch reduces the gradients that a rank has. A rank without one would send fewer values than
    the others, so it sends zeros. Once all ranks know which parameters none of them used, these have
    no gradient again, as in one process.

    Args:
        names: the task's parameters by name, sharded.
        order: compares the order of the ranks.
    """

    def __init__(self, names: Mapping[str, nn.Parameter], order: CollectiveOrder) -> None:
        self.order = order
        self._index = {id(parameter): i for i, parameter in enumerate(names.values())}
        self._parameters = list(names.values())
        self._filled: set[int] = set()
        self._used: set[int] = set()
        self._counts: tuple[frozenset[int], Tensor] | None = None
        self._undo: list[Callable[[], Any]] = []

    def watch(self, name: str, module: Any, *, root: bool, eager: Callable[..., Any]) -> None:
        """Follow each gather and each reduction of ``module``, which fully_shard has wrapped.

        Args:
            name: its name in the task.
            root: whether it is the task itself, which every pass gathers first.
            eager: wraps a function that torch.compile must not trace.
        """
        gather = ("gather", name)
        if not root:

            def before(module: nn.Module, args: Any) -> None:
                self.order.follow(gather)

            self._undo.append(module.register_forward_pre_hook(eager(before), prepend=True).remove)
        for group in groups_of(module):
            group.pre_backward = self._gathers(group, gather)
            group.post_backward = self._reduces(group, ("reduce", name))
            self._undo += [partial(delattr, group, n) for n in ("pre_backward", "post_backward")]

    def close(self) -> None:
        """Watch no more."""
        while self._undo:
            self._undo.pop()()

    def _gathers(self, group: Any, event: tuple[str, str]) -> Callable[..., Any]:
        inner = group.pre_backward

        def pre_backward(*args: Any) -> Any:
            # torch calls it for each output of a module, and gathers once.
            if group._training_state.name != "PRE_BACKWARD":
                self.order.follow(event)
            return inner(*args)

        return pre_backward

    def _reduces(self, group: Any, event: tuple[str, str]) -> Callable[..., Any]:
        inner = group.post_backward

        def post_backward(*args: Any) -> Any:
            if group.reduce_grads and self._complete(group):
                self.order.follow(event)
            return inner(*args)

        return post_backward

    def _complete(self, group: Any) -> bool:
        """Give zeros to the trained parameters that have no gradient, if others of the group have one.

        Returns:
            Whether the group has gradients.
        """
        without, dtypes, grads = [], set(), []
        for each in group.fsdp_params:
            whole = getattr(each, "_unsharded_param", None)
            if whole is None:
                continue
            added = each.unsharded_accumulated_grad
            if added is None and whole.grad is None:
                without.append(each)
                continue
            self._used.add(self._index[id(each.sharded_param)])
            grads.append(each)
            dtypes.add(whole.grad.dtype if added is None else added.dtype)
        if not grads:
            return False
        if len(dtypes) > 1:  # some were used in the last micro-batch alone
            for each in grads:
                each.accumulate_unsharded_grad_if_needed()
                each.to_accumulated_grad_if_needed()
            dtypes = {each.reduce_dtype for each in grads}
        (dtype,) = dtypes
        for each in without:
            whole = each._unsharded_param
            if whole.requires_grad:
                zeros = torch.zeros_like(whole, dtype=dtype)
                if dtype == whole.dtype:
                    whole.grad = zeros
                else:
                    each.unsharded_accumulated_grad = zeros
                self._filled.add(self._index[id(each.sharded_param)])
        return True

    def fill_whole(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give zeros to trained parameters that are not sharded and have no gradient."""
        for parameter in parameters:
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                self._filled.add(self._index[id(parameter)])
            else:
                self._used.add(self._index[id(parameter)])

    def counts(self, device: torch.device) -> Tensor:
        """Return for each parameter 1 if this rank used it in the step, to be added over all ranks."""
        unused = frozenset(self._filled - self._used)
        if self._counts is None or self._counts[0] != unused:
            ones = torch.ones(len(self._parameters), dtype=torch.float64)
            ones[sorted(unused)] = 0
            self._counts = unused, ones.to(device)
        return self._counts[1]

    def drop_unused(self, counts: Tensor | None) -> None:
        """Take the gradient off the parameters that no rank used.

        Args:
            counts: the sum of ``counts`` over all ranks. It is read only if this rank left
                parameters unused.
        """
        unused = self._filled - self._used
        self._filled, self._used = set(), set()
        if unused and counts is not None:
            used = counts.tolist()
            for index in unused:
                if not used[index]:
                    self._parameters[index].grad = None


def groups_of(module: Any) -> list[Any]:
    """Return torch's groups of a module that fully_shard has wrapped."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # one per module before torch 2.13
    found = [state._fsdp_param_group] if several is None else several
    return [group for group in found if group is not None]


def watched_groups(
    task: nn.Module, world: Communicator, timeout: float, *, compiles: bool
) -> FsdpGroups:
    """Return the groups of ``task``, which is sharded, watched from now on; collective.

    Args:
        task: the task.
        world: all ranks.
        timeout: seconds that a rank waits in a collective.
        compiles: whether modules of the task are compiled.
    """
    from torch.distributed.fsdp import FSDPModule

    wrapped: list[tuple[str, Any]] = [
        (name, module) for name, module in task.named_modules() if isinstance(module, FSDPModule)
    ]
    inside = {name: [n for n, _ in module.named_parameters(name)] for name, module in wrapped}
    order = CollectiveOrder(
        world,
        lambda event: inside[event[1]],
        "FSDP gathers these parameters, and reduces their gradients, on all ranks in one order. "
        "Give FSDP(wrap=) modules that every rank uses in every step, so that these belong to a "
        "larger one (wrap=10**12 takes all as one), or take DDP(find_unused_parameters=True)",
        timeout,
    )
    groups = FsdpGroups(dict(task.named_parameters()), order)
    for name, module in wrapped:
        groups.watch(
            name,
            module,
            root=module is task,
            eager=torch.compiler.disable if compiles else lambda function: function,
        )
    return groups

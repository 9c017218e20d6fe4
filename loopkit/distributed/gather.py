"""all_gather: the values of all ranks with gradients, for losses over the outputs of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loopkit.errors import TaskError

# How many consecutive ranks train on the same samples, and whether this rank's batch is a dummy.
_TP_SIZE: ContextVar[int] = ContextVar("tp_size", default=1)
_IS_DUMMY: ContextVar[bool] = ContextVar("is_dummy", default=False)


def all_gather(tensor: Tensor) -> tuple[Tensor, slice]:
    """Return the rows of all data-parallel ranks, with gradients, and which of them are this rank's.

    Call it in ``train_step``, on every rank. The gradient of a step is then that of one big batch:
    each rank's rows get the gradients of the losses of all ranks. Alone it returns the tensor itself.

    Example::

        z = F.normalize(self.encoder(x))
        everyone, mine = loopkit.all_gather(z)
        target = torch.arange(mine.start, mine.stop)
        loss = F.cross_entropy(z @ other.T, target)

    Args:
        tensor: rows of this rank, [n, ...]. ``n`` may differ by rank; the other sizes and the dtype
            may not.

    Returns:
        The rows in the order of the ranks, [sum of n, ...], and the slice of this rank's rows. The
        rows of a dummy batch, which has no samples, come last and on their own rank alone.

    Raises:
        TaskError: gradients are off, as in an evaluation, where ranks may have different numbers of
            batches. Or the tensors do not fit together.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor, slice(0, len(tensor))
    if not torch.is_grad_enabled():
        raise TaskError(
            "all_gather is for train_step: in an evaluation the ranks may have different numbers of "
            "batches, and would wait for ever. Return the outputs from eval_step and define "
            "compute_metrics(outputs), which gets those of all ranks"
        )
    tp_size, is_dummy = _TP_SIZE.get(), _IS_DUMMY.get()
    given = tensor[:0] if is_dummy else tensor
    about = (len(given), tuple(tensor.shape[1:]), str(tensor.dtype))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, about)
    if len({each[1:] for each in everyone}) > 1:
        shown = ", ".join(
            f"[{', '.join(map(str, ('n', *sizes)))}] {dtype} on rank {rank}"
            for rank, (_, sizes, dtype) in enumerate(everyone)
        )
        raise TaskError(f"all_gather got tensors that do not fit together: {shown}")
    lengths = [each[0] for each in everyone]
    # Ranks that train on the same samples count once.
    rows: Tensor = _AllGather.apply(given, lengths, tp_size)  # type: ignore[no-untyped-call]
    leader = dist.get_rank() // tp_size * tp_size
    start = sum(lengths[:leader:tp_size])
    if is_dummy:
        return torch.cat((rows, tensor)), slice(len(rows), len(rows) + len(tensor))
    return rows, slice(start, start + len(tensor))


class _AllGather(torch.autograd.Function):
    """Gathers rows of any number; the gradients of all ranks are added for the rank that gave a row."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, lengths: list[int], tp_size: int) -> Tensor:
        ctx.lengths, ctx.tp_size = lengths, tp_size
        # gloo sends tensors of one size alone.
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, lengths)][::tp_size])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        leader = dist.get_rank() // ctx.tp_size * ctx.tp_size
        start = sum(ctx.lengths[: leader : ctx.tp_size])
        own = total[start : start + ctx.lengths[dist.get_rank()]]
        return (own / ctx.tp_size if ctx.tp_size > 1 else own), None, None


@contextmanager
def dummy_batch(context: AbstractContextManager[Any] | None = None) -> Iterator[None]:
    """Inside, and inside ``context``, this rank's batch has no samples: ``all_gather`` sends none."""
    token = _IS_DUMMY.set(True)
    try:
        with context or nullcontext():
            yield
    finally:
        _IS_DUMMY.reset(token)


def set_tp_size(size: int) -> None:
    """Note how many consecutive ranks train on the same samples."""
    _TP_SIZE.set(size)

"""LayerTable: a model layer by layer, with its parameters and the shapes of its outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopkit.console.text import byte_size, columns, cut, width
from loopkit.nested import map_tensors
from loopkit.preserve import preserved_modes

_NAME_WIDTH = 40


@dataclass(frozen=True)
class ParameterCount:
    """The parameters of a module, each counted once even if several submodules share it.

    Attributes:
        total, trainable: elements.
        size: bytes of parameters and buffers.
        lazy: parameters without a shape yet; they are in no other count.
    """

    total: int
    trainable: int
    size: int
    lazy: int = 0

    def __str__(self) -> str:
        """Return the counts as one line."""
        trained = "all" if self.trainable == self.total else f"{self.trainable:,}"
        text = f"{self.total:,} parameters, {trained} trainable, {byte_size(self.size)}"
        return text + (f"; {self.lazy} more without a shape yet" if self.lazy else "")


def count_parameters(module: nn.Module) -> ParameterCount:
    """Count the parameters of ``module``. Reads no values, so they may be on the meta device."""
    return _count_tensors(module.parameters(), module.buffers())


def _count_tensors(parameters: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> ParameterCount:
    parameters, buffers = list(parameters), list(buffers)
    known = [p for p in parameters if not is_lazy(p)]
    stored = [t for t in (*known, *buffers) if not is_lazy(t)]
    return ParameterCount(
        total=sum(p.numel() for p in known),
        trainable=sum(p.numel() for p in known if p.requires_grad),
        size=sum(t.numel() * t.element_size() for t in stored),
        lazy=len(parameters) - len(known),
    )


@dataclass(frozen=True)
class LayerRow:
    """One module of a model.

    Attributes:
        name: its full name; "" for the model itself.
        kind: the name of its class.
        depth: its level in the model, which is at 0.
        counts: of the parameters that no earlier module uses.
        shared: elements of the parameters that an earlier module uses too.
        shape: of its output, such as ``[32, 10]``; several of them are listed. Empty if the table
            was made without a batch.
    """

    name: str
    kind: str
    depth: int
    counts: ParameterCount
    shared: int = 0
    shape: str = ""


@dataclass(frozen=True)
class LayerTable:
    """A model layer by layer. ``str()`` gives an aligned table; rich prints it as its own table.

    Attributes:
        rows: the model and its modules, in the order in which they were assigned.
        totals: the parameters of the whole model.
    """

    rows: tuple[LayerRow, ...]
    totals: ParameterCount

    def header(self) -> list[tuple[str, bool]]:
        """Return the columns as (name, whether it is aligned to the right)."""
        found = [("Layer", False), ("Class", False), ("Parameters", True), ("Trainable", True)]
        return [*found, ("Output shape", False)] if any(row.shape for row in self.rows) else found

    def cells(self) -> list[list[str]]:
        """Return the rows as text, one cell for each column."""
        count = len(self.header())
        return [_cells(row)[:count] for row in self.rows]

    def __str__(self) -> str:
        """Return an aligned table and a line of totals."""
        names = [name for name, _ in self.header()]
        lines = columns([names, *self.cells()], [right for _, right in self.header()])
        rule = "-" * max(map(width, lines))
        return "\n".join([lines[0], rule, *lines[1:], rule, str(self.totals)])

    def __rich__(self) -> Any:
        """Return the same as a rich table."""
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for name, right in self.header():
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        for row in self.cells():
            table.add_row(*row)
        return Group(table, f"\n{self.totals}")


def layer_table(module: nn.Module, batch: Any = None, depth: int = 2) -> LayerTable:
    """Return a table of the submodules of ``module``, down to ``depth`` levels.

    Args:
        batch: run the module once on this batch to get the shapes of outputs. It is the argument of
            a Task's ``predict_step``, or of ``forward``: a tuple gives its positional arguments, a
            dict its named ones. The run is in eval mode and without gradients. A model on the meta
            device runs there, and of one with lazy parameters a copy runs.
        depth: levels below the module itself.
    """
    if batch is not None and any(is_lazy(p) for p in module.parameters()):
        module = copy.deepcopy(module)
    shapes = {} if batch is None else _output_shapes(module, batch)
    seen: set[int] = set()
    owned: dict[str, list[Tensor]] = {}
    shared: dict[str, int] = {}
    for name, part in module.named_modules():
        direct = list(part.parameters(recurse=False))
        owned[name] = [p for p in direct if id(p) not in seen]
        shared[name] = _count_tensors(p for p in direct if id(p) in seen).total
        seen.update(map(id, direct))
    rows = []
    for name, part in module.named_modules():
        level = name.count(".") + 1 if name else 0
        if level > depth:
            continue
        inside = [n for n in owned if not name or n == name or n.startswith(f"{name}.")]
        row = LayerRow(
            name=name,
            kind=type(part).__name__,
            depth=level,
            counts=_count_tensors(p for n in inside for p in owned[n]),
            shared=sum(shared[n] for n in inside),
            shape=shapes.get(name, ""),
        )
        rows.append(row)
    return LayerTable(tuple(rows), count_parameters(module))


def _cells(row: LayerRow) -> list[str]:
    counts = row.counts
    name = "  " * row.depth + (row.name.rpartition(".")[2] or "(model)")
    if counts.lazy and not counts.total:
        return [cut(name, _NAME_WIDTH), row.kind, "lazy", "", row.shape]
    if counts.total:
        total = f"{counts.total:,}"
    else:
        total = "shared" if row.shared else "-"
    if not counts.total:
        trained = ""
    elif counts.trainable in (0, counts.total):
        trained = "yes" if counts.trainable else "no"
    else:
        trained = f"{counts.trainable:,}"
    return [cut(name, _NAME_WIDTH), row.kind, total, trained, row.shape]


def _output_shapes(module: nn.Module, batch: Any) -> dict[str, str]:
    """Return the shape of each submodule's last output, by name."""
    found: dict[str, str] = {}
    device = next((p.device for p in module.parameters()), None)
    if device is not None and device.type == "meta":
        batch = map_tensors(lambda tensor: tensor.to("meta"), batch)
    handles = [
        part.register_forward_hook(
            lambda _module, _args, out, name=name: found.__setitem__(name, _shape(out))
        )
        for name, part in module.named_modules()
    ]
    try:
        with preserved_modes(module, device), torch.no_grad():
            module.eval()
            found[""] = _shape(_call(module, batch))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _call(module: nn.Module, batch: Any) -> Any:
    predict = getattr(module, "predict_step", None)
    if callable(predict):
        return predict(batch)
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


def _shape(out: Any) -> str:
    """Return the shapes of all tensors in an output."""
    if isinstance(out, Tensor):
        return str(list(out.shape))
    if isinstance(out, Mapping):
        return ", ".join(f"{key} {shape}" for key, part in out.items() if (shape := _shape(part)))
    if isinstance(out, (tuple, list)):
        return ", ".join(shape for part in out if (shape := _shape(part)))
    return ""

"""The table of parameter groups: what is optimised, at which rate and with which decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from loopkit.optim.builder import make_optimizers


def group_table(
    task: nn.Module, optimizers: Optimizer | Mapping[str, Optimizer] | None = None
) -> str:
    """Return the parameter groups as text: a row for each, with its size, rate and weight decay.

    Args:
        task: the module that holds the parameters.
        optimizers: one, or several by name; None builds what ``task.optimizers()`` returns.

    Raises:
        TaskError: ``task.optimizers()`` returned something else.
        OptionError: a spec cannot be built.
    """
    if optimizers is None:
        optimizers = {name: optimizer for name, (optimizer, _) in make_optimizers(task).items()}
    named = optimizers if isinstance(optimizers, Mapping) else {"main": optimizers}
    rows = [("group", "parameters", "elements", "lr", "weight decay")]
    for name, optimizer in named.items():
        prefix = f"{name}: " if len(named) > 1 else ""
        for number, group in enumerate(optimizer.param_groups):
            rows.append(_row(prefix + str(group.get("name", f"group {number}")), group))
    trainable = {id(p): p.numel() for p in task.parameters() if p.requires_grad}
    rows.append(("trainable", str(len(trainable)), f"{sum(trainable.values()):,}", "", ""))
    frozen = [p.numel() for p in task.parameters() if not p.requires_grad]
    if frozen:
        rows.append(("frozen", str(len(frozen)), f"{sum(frozen):,}", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(w)}" for cell, w in zip(row[1:], widths[1:]))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, group: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    rate = group.get("initial_lr", group["lr"])
    parameters = group["params"]
    elements = sum(p.numel() for p in parameters)
    return (
        name,
        str(len(parameters)),
        f"{elements:,}",
        f"{float(rate):.4g}",
        f"{group.get('weight_decay', 0.0):g}",
    )

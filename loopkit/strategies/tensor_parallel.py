"""TensorParallel: ranks split single layers among them, and compute each of these layers together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from loopkit.checks import checked_int
from loopkit.errors import OptionError, nearest
from loopkit.keywords import checks_keywords

STYLES = ("colwise", "rowwise", "colwise_rep", "rowwise_rep", "sequence_parallel")
# Our name of each style that transformers' plans use.
_TRANSFORMERS_STYLES = {style: style for style in STYLES} | {
    "colwise_gather_output": "colwise_rep",
    "embedding_rowwise": "rowwise_rep",
    "embedding_colwise": "colwise_rep",
}


@checks_keywords
@dataclass(frozen=True)
class TensorParallel:
    """How the ranks of a tensor-parallel group, which train on the same samples, split layers.

    As ``Fit(strategy=)`` it makes the ranks of a machine one group. If there are more ranks than
    ``size``, each group trains on its own batches, and FSDP shards every layer over the groups as
    well; ``FSDP(tensor=...)`` gives its settings.

    Megatron-LM splits layers so (Shoeybi et al., 2019, arXiv:1909.08053). torch's
    ``parallelize_module`` does it.

    Args:
        plan: how each layer is split, by its name; in "blocks.*.up" each * stands for one part of a
            name. "auto" takes the plan that a transformers model has. The values are objects of
            torch's ``ParallelStyle``, or these names:
            "colwise": by outputs, which stay split.
            "colwise_rep": by outputs, which are gathered.
            "rowwise": by inputs, which come split; outputs are summed.
            "rowwise_rep": by inputs, which come whole; or an embedding by its vocabulary.
            "sequence_parallel": a norm, on activations that are split along the sequence.
        size: ranks in a tensor-parallel group; None takes those of one machine.

    Raises:
        OptionError: the plan is empty or has an unknown style, or the size is not a number of
            ranks.
    """

    plan: Mapping[str, Any] | Literal["auto"]
    size: int | None = None

    def __post_init__(self) -> None:
        if self.plan != "auto" and (not isinstance(self.plan, Mapping) or not self.plan):
            raise OptionError(
                f"TensorParallel(plan={self.plan!r}): give a dict of layers' names and how each is "
                "split, such as {'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'}, or 'auto'"
            )
        for layer, style in self.plan.items() if isinstance(self.plan, Mapping) else ():
            if isinstance(style, str) and style not in STYLES:
                raise OptionError(
                    f"TensorParallel(plan={{{layer!r}: {style!r}}}): give one of "
                    f"{', '.join(STYLES)}, or a ParallelStyle of torch's.{nearest(style, STYLES)}"
                )
        checked_int(self.size, "TensorParallel(size=)", or_none=True)

    def tp_size(self, world_size: int, local_size: int) -> int:
        """Return how many ranks are in a tensor-parallel group.

        Args:
            world_size: the number of ranks.
            local_size: the number of ranks on one machine.

        Raises:
            OptionError: the ranks cannot be divided evenly.
        """
        size = self.size or local_size
        if world_size % size:
            raise OptionError(
                f"TensorParallel(size={size}): {world_size} ranks cannot be divided into "
                f"tensor-parallel groups of {size}"
            )
        return size

    def apply(self, task: nn.Module, mesh: Any) -> None:
        """Split the layers of ``task`` in place; their parameters become DTensors.

        Args:
            mesh: the device mesh of this rank's tensor-parallel group.

        Raises:
            OptionError: no model has a plan, a name of the plan fits no layer, or a layer cannot be
                split evenly. Or the plan splits layers that share a parameter in different ways.
        """
        from torch.distributed.tensor.parallel import parallelize_module

        styles = {}
        plan = self.plan if isinstance(self.plan, Mapping) else _plan_of_model(task)
        names = [name for name, _ in task.named_modules() if name]
        for pattern, style in plan.items():
            layers = [name for name in names if _matches(name, pattern)]
            if not layers:
                raise OptionError(
                    f"TensorParallel(plan=...): no layer is called {pattern!r}."
                    f"{nearest(pattern, names)} There are {', '.join(names[:12])}"
                    f"{' …' if len(names) > 12 else ''}"
                )
            for name in layers:
                _check_splits_evenly(task.get_submodule(name), name, style, mesh.size())
                styles[name] = _parallel_style(style)
        tied = _tied_parameters(task)
        parallelize_module(task, mesh, styles)
        for parameter_names in tied:
            _tie(task, parameter_names)


def _plan_of_model(task: nn.Module) -> dict[str, str]:
    """Return the plan of the first model in ``task`` that has one, by the task's names."""
    for prefix, module in task.named_modules():
        plan: Any = getattr(module, "tp_plan", None) or getattr(module, "_tp_plan", None)
        if isinstance(plan, Mapping) and plan:
            unknown = sorted(
                {style for style in plan.values() if style not in _TRANSFORMERS_STYLES}
            )
            if unknown:
                raise OptionError(
                    f"TensorParallel('auto'): the plan of {type(module).__name__} has the styles "
                    f"{', '.join(unknown)}, which are not known here: give one of your own"
                )
            start = f"{prefix}." if prefix else ""
            return {start + name: _TRANSFORMERS_STYLES[style] for name, style in plan.items()}
    raise OptionError(
        "TensorParallel('auto'): no model in the task has a plan, as many of transformers do: give "
        "a dict of layers' names and how each is split"
    )


def _tied_parameters(task: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in task.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [of_one for of_one in names.values() if len(of_one) > 1]


def _tie(task: nn.Module, names: list[str]) -> None:
    """Make all ``names`` one parameter again; ``parallelize_module`` makes one for each."""
    first = task.get_parameter(names[0])
    for name in names[1:]:
        owner, _, attribute = name.rpartition(".")
        other: Any = task.get_parameter(name)
        if getattr(first, "placements", None) != getattr(other, "placements", None):
            raise OptionError(
                f"TensorParallel: {names[0]} and {name} are one parameter, and the plan splits "
                "them in different ways"
            )
        setattr(task.get_submodule(owner), attribute, first)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _check_splits_evenly(layer: nn.Module, name: str, style: Any, ranks: int) -> None:
    if not isinstance(style, str) or style == "sequence_parallel":
        return
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2:
        raise OptionError(
            f"TensorParallel(plan={{{name!r}: {style!r}}}): a {type(layer).__name__} has no weight "
            "matrix: name the Linear and Embedding layers in it"
        )
    # The rows of a Linear's weight are its outputs, those of an Embedding's its inputs.
    by_rows = style.startswith("colwise") != isinstance(layer, nn.Embedding)
    size = weight.shape[0 if by_rows else 1]
    if size % ranks:
        way = "rows" if by_rows else "columns"
        raise OptionError(
            f"TensorParallel: {name}.weight has {size} {way}, which {ranks} ranks cannot share "
            "evenly"
        )


def _parallel_style(style: Any) -> Any:
    """Return torch's ParallelStyle for a name; one that is given stays itself."""
    if not isinstance(style, str):
        return style
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    made: dict[str, Callable[[], Any]] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
        "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
        "sequence_parallel": SequenceParallel,
    }
    return made[style]()

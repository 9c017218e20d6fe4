"""TensorParallel: single layers split over ranks, which compute each of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from loopkit.checks import checked_int
from loopkit.errors import OptionError, nearest
from loopkit.keywords import checks_keywords

STYLES = ("colwise", "rowwise", "colwise_rep", "rowwise_rep", "sequence_parallel")
# transformers' names of them: ours, and some of its own.
_THEIRS = {style: style for style in STYLES} | {
    "colwise_gather_output": "colwise_rep",
    "embedding_rowwise": "rowwise_rep",
    "embedding_colwise": "colwise_rep",
}


@checks_keywords
@dataclass(frozen=True)
class TensorParallel:
    """How layers are split over the ranks of a team, which train on the same samples.

    As a strategy of its own it takes all ranks of a machine for a team. Where there are more ranks
    than ``size``, teams share out the data, and FSDP shards every layer over the teams as well;
    ``FSDP(tensor=...)`` says how.

    After Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053), by torch's ``parallelize_module``.

    Args:
        plan: for the names of layers ("blocks.*.up": each * stands for one part of a name) how each
            is split: a ParallelStyle of ``torch.distributed.tensor.parallel``, or "colwise" (by
            outputs, which stay split), "rowwise" (by inputs, which come split; outputs are added
            up), "colwise_rep" (by outputs, which are gathered), "rowwise_rep" (by inputs, or an
            embedding by its words, given whole), "sequence_parallel" (a norm on activations that
            are split along the sequence). "auto" takes the plan that a transformers model comes
            with.
        size: ranks in a team; None takes those of one machine.

    Raises:
        OptionError: the plan is empty or has a style that is not known, or the size is not a number
            of ranks.
    """

    plan: Mapping[str, Any] | Literal["auto"]
    size: int | None = None

    def __post_init__(self) -> None:
        if self.plan != "auto" and (not isinstance(self.plan, Mapping) or not self.plan):
            raise OptionError(
                f"TensorParallel(plan={self.plan!r}): give a dict of layers' names and how each is "
                "split, such as {'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'}, or "
                "'auto'"
            )
        for layer, style in self.plan.items() if isinstance(self.plan, Mapping) else ():
            if isinstance(style, str) and style not in STYLES:
                raise OptionError(
                    f"TensorParallel(plan={{{layer!r}: {style!r}}}): give one of "
                    f"{', '.join(STYLES)}, or "
                    f"a ParallelStyle of torch's.{nearest(style, STYLES)}"
                )
        checked_int(self.size, "TensorParallel(size=)", or_none=True)

    def team(self, ranks: int, local: int) -> int:
        """How many of ``ranks`` make a team, where a machine has ``local``.

        Raises:
            OptionError: they cannot be dealt out evenly.
        """
        size = self.size or local
        if ranks % size:
            raise OptionError(
                f"TensorParallel(size={size}): {ranks} ranks cannot be dealt out into teams of "
                f"{size}"
            )
        return size

    def apply(self, task: nn.Module, mesh: Any) -> None:
        """Split the layers of ``task`` over the ranks of ``mesh``, in place: their parameters
        become DTensors.

        Raises:
            OptionError: a name of the plan fits no layer, a layer cannot be split evenly, layers
                that share a parameter are split in different ways, or there is no plan to take.
        """
        from torch.distributed.tensor.parallel import parallelize_module

        styles = {}
        plan = self.plan if isinstance(self.plan, Mapping) else _own_plan(task)
        for pattern, style in plan.items():
            layers = [name for name, _ in task.named_modules() if _fits(name, pattern)]
            if not layers:
                names = [name for name, _ in task.named_modules() if name]
                raise OptionError(
                    f"TensorParallel(plan=...): no layer is called {pattern!r}."
                    f"{nearest(pattern, names)} There are {', '.join(names[:12])}"
                    f"{' …' if len(names) > 12 else ''}"
                )
            for name in layers:
                _check(task.get_submodule(name), name, style, mesh.size())
                styles[name] = _style(style)
        shared = _shared(task)
        parallelize_module(task, mesh, styles)
        for names in shared:
            _tie(task, names)


def _own_plan(task: nn.Module) -> dict[str, str]:
    """The plan that a model in ``task`` comes with, by the task's names and ours of the styles."""
    modules: Iterable[tuple[str, Any]] = task.named_modules()
    for prefix, module in modules:
        found = getattr(module, "tp_plan", None) or getattr(module, "_tp_plan", None)
        if isinstance(found, Mapping) and found:
            unknown = sorted({style for style in found.values() if style not in _THEIRS})
            if unknown:
                raise OptionError(
                    f"TensorParallel('auto'): the plan of {type(module).__name__} has the styles "
                    f"{', '.join(unknown)}, which are not known here: give one of your own"
                )
            start = f"{prefix}." if prefix else ""
            return {start + name: _THEIRS[style] for name, style in found.items()}
    raise OptionError(
        "TensorParallel('auto'): no model in the task comes with a plan, as many of transformers "
        "do: "
        "give a dict of layers' names and how each is split"
    )


def _shared(task: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in task.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [alike for alike in names.values() if len(alike) > 1]


def _tie(task: nn.Module, names: list[str]) -> None:
    """Have one parameter under all ``names`` again: splitting made one for each."""
    first = task.get_parameter(names[0])
    for name in names[1:]:
        owner, _, own = name.rpartition(".")
        other: Any = task.get_parameter(name)
        if getattr(first, "placements", None) != getattr(other, "placements", None):
            raise OptionError(
                f"TensorParallel: {names[0]} and {name} are one parameter, and the plan splits "
                f"them in "
                "different ways"
            )
        setattr(task.get_submodule(owner), own, first)


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _check(layer: nn.Module, name: str, style: Any, ranks: int) -> None:
    if not isinstance(style, str) or style == "sequence_parallel":
        return
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2:
        raise OptionError(
            f"TensorParallel(plan={{{name!r}: {style!r}}}): a {type(layer).__name__} has no weight "
            "matrix: name the Linear and Embedding layers in it"
        )
    by_outputs = style.startswith("colwise") != isinstance(
        layer, nn.Embedding
    )  # whose weight lies the other way
    size = weight.shape[0 if by_outputs else 1]
    if size % ranks:
        way = "rows" if by_outputs else "columns"
        raise OptionError(
            f"TensorParallel: {name}.weight has {size} {way}, which {ranks} ranks cannot share "
            f"evenly"
        )


def _style(style: Any) -> Any:
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

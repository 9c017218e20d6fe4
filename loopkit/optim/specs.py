"""OptimizerSpec: an optimizer that a Task describes, built over its parameters on the device."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.checks import checked_number
from loopkit.errors import OptionError
from loopkit.foreign_names import OPTIMIZER_ARGUMENTS, SCHEDULE_NAMES
from loopkit.keywords import unknown_keyword
from loopkit.optim.groups import ParamGroup, check_pattern, partition, select
from loopkit.optim.schedules import Plateau, Schedule

logger = logging.getLogger(__name__)

SETTINGS = ("lr", "weight_decay", "schedule", "no_decay", "params", "groups", "layer_decay")
_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


@dataclass(frozen=True)
class OptimizerSpec:
    """A torch optimizer to be built over the parameters of a task.

    Where torch has a fused kernel for the optimizer, it is used.

    Attributes:
        optimizer: the class.
        lr: the base learning rate.
        weight_decay: the weight decay of the parameters that decay.
        schedule: the learning rate over the run; None keeps it.
        no_decay: which parameters do not decay: "auto" (biases and norms), regular expressions of
            names, or () for none.
        params: which parameters to optimise: None for all, a regular expression of names, a module,
            parameters, or a function of the task that returns names.
        options: further arguments of the class.
        groups: settings by name of the parameters; the first group that matches holds.
        layer_decay: the factor of the rate from each layer to the one below, such as 0.95. The head
            has the rate ``lr``.
        name: the name of the optimizer in messages; "" takes that of the class.

    Raises:
        OptionError: an argument that is not accepted, or that the class does not have.
    """

    optimizer: type[Optimizer]
    lr: float
    weight_decay: float = 0.0
    schedule: Schedule | Plateau | None = None
    no_decay: str | Sequence[str] = "auto"
    params: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[ParamGroup] = ()
    layer_decay: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.optimizer.__name__)
        checked_number(self.lr, f"{self.name}(lr=)", at_least=0)
        checked_number(self.weight_decay, f"{self.name}(weight_decay=)", at_least=0)
        checked_number(
            self.layer_decay, f"{self.name}(layer_decay=)", above=0, at_most=1, or_none=True
        )
        if self.schedule is not None and not isinstance(self.schedule, (Schedule, Plateau)):
            meant = SCHEDULE_NAMES.get(str(self.schedule), "cosine()")
            raise OptionError(
                f"{self.name}(schedule={self.schedule!r}): give a schedule of loopkit.optim, as "
                f"schedule={meant}"
            )
        for pattern in [self.no_decay] if isinstance(self.no_decay, str) else self.no_decay:
            check_pattern(pattern, f"{self.name}(no_decay=)")
        if any(not isinstance(group, ParamGroup) for group in self.groups):
            raise OptionError(
                f"{self.name}(groups=...): give a sequence of ParamGroup(match=..., lr=..., "
                "weight_decay=...)"
            )
        self._check_options()

    def _check_options(self) -> None:
        accepted = arguments(self.optimizer)
        if accepted is None:
            return
        known = sorted({*accepted, *SETTINGS})
        for option in self.options:
            if option not in accepted:
                foreign = {
                    theirs: ours
                    for theirs, ours in OPTIMIZER_ARGUMENTS.items()
                    if ours.partition("=")[0] in known
                }
                raise unknown_keyword(self.name, option, known, foreign)
        if self.weight_decay and "weight_decay" not in accepted:
            raise OptionError(
                f"{self.name}(weight_decay={self.weight_decay!r}): this optimizer has no weight "
                "decay"
            )

    def build(self, task: nn.Module) -> Optimizer:
        """Return the optimizer over the parameters of ``task``, in their groups.

        Raises:
            OptionError: ``params`` or a group picks no parameter, or the class refuses an option.
        """
        chosen = select(task, self.params, self.name)
        groups = partition(
            task,
            chosen,
            lr=self.lr,
            weight_decay=self.weight_decay,
            no_decay=self.no_decay,
            groups=self.groups,
            layer_decay=self.layer_decay,
        )
        options = dict(self.options)
        if options.get("fused", True) is None:
            del options["fused"]
        if self._may_fuse(task, options, chosen.values()):
            # Some versions of torch have no fused kernel for the device.
            with suppress(RuntimeError):
                made = self._make([dict(group) for group in groups], {**options, "fused": True})
                logger.debug("%s uses torch's fused kernel", self.name)
                return made
        try:
            return self._make(groups, options)
        except RuntimeError as error:
            raise OptionError(f"{self.name} cannot be built: {error}") from error

    def _may_fuse(
        self, task: nn.Module, options: Mapping[str, Any], parameters: Iterable[nn.Parameter]
    ) -> bool:
        if "fused" not in (arguments(self.optimizer) or ()):
            return False
        # torch's fused SGD with dampening cannot start the momentum of one parameter later.
        if {"fused", "foreach"} & options.keys() or options.get("dampening"):
            return False
        sparse = sparse_parameters(task)
        return all(
            id(parameter) not in sparse and _is_fusable(self.optimizer, parameter)
            for parameter in parameters
        )

    def _make(self, groups: list[dict[str, Any]], options: Mapping[str, Any]) -> Optimizer:
        try:
            return self.optimizer(groups, lr=self.lr, **options)  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise OptionError(f"{self.name} cannot be built: {error}") from error


def _is_fusable(optimizer: type[Optimizer], parameter: Tensor) -> bool:
    """Return whether torch's fused kernel exists for ``parameter``, and is correct."""
    device = parameter.device.type
    half = parameter.element_size() == 2
    if device == "cpu" and half and issubclass(optimizer, torch.optim.SGD):
        # Up to torch 2.13 it skips whole vectors of 16-bit numbers (pytorch issue 191763).
        return False
    return device in _FUSED_DEVICES and parameter.is_floating_point()


def sparse_parameters(task: nn.Module) -> set[int]:
    """Return the ids of the parameters with sparse gradients, which fused kernels do not take."""
    return {
        id(module.weight)
        for module in task.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    }


def arguments(optimizer: type[Optimizer]) -> dict[str, Any] | None:
    """Return the arguments of the class by name with their defaults; None where it takes any."""
    # The first two are self and the parameters.
    parameters = list(inspect.signature(optimizer.__init__).parameters.values())[2:]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters}

"""What a LightningModule logs: values of a step, averages and metric objects of an epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from loopkit.errors import TaskError
from loopkit.metrics.accumulator import Gather, MetricAccumulator
from loopkit.metrics.sync import merge
from loopkit.nested import map_tensors, to_cpu

_REDUCTIONS = {
    "mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max", "amin": "min", "amax": "max",
}  # fmt: skip
TRAIN = "train"


class LightningLog:
    """Takes what ``LightningModule.log`` hands to the trainer, under Lightning's rules of names.

    A value of a step goes to the run's accumulator and stays there until the next step, so a log
    shows the last step. Averages of an epoch are those over all ranks, weighted by samples.

    Args:
        module: the module, whose metric objects are saved and reset.

    Attributes:
        phase: "train", "validation" or "test".
        accumulator: where values of the training step go.
        values: the latest value by name, as tensors: Lightning's ``callback_metrics``.
        batch_size: samples in the batch at hand; 0 for a dummy batch, which is not logged.
        suffix: the ending of names of the present data loader, if there are several.
        rank: this process's rank.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.phase = TRAIN
        self.accumulator: MetricAccumulator | None = None
        self.values: dict[str, Tensor] = {}
        self.batch_size = 1
        self.suffix = ""
        self.rank = 0
        self._of_step: set[str] = set()
        self._epochs: dict[str, MetricAccumulator] = {}
        self._metrics: dict[str, dict[str, tuple[str, bool]]] = {}
        self._plain: dict[str, str] = {}  # the name without _epoch of a name with it
        self._hidden: set[str] = set()

    def log(
        self,
        hook: str,
        name: str,
        value: Any,
        *,
        on_step: bool,
        on_epoch: bool,
        logger: bool = True,
        reduce_fx: Any = "mean",
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
        **_: Any,
    ) -> None:
        """Keep one value; the arguments are those of Lightning's result collection.

        Raises:
            TaskError: a reduction other than mean, sum, min and max.
        """
        if not self.batch_size or (rank_zero_only and self.rank):
            return
        suffix = self.suffix if add_dataloader_idx else ""
        both = on_step and on_epoch
        of_step = name + "_step" * both + suffix
        of_epoch = name + "_epoch" * both + suffix
        self._plain[of_epoch] = name + suffix
        if not logger and self.phase == TRAIN:
            self._hidden |= {of_step, of_epoch}
        if isinstance(value, Metric):
            path = metric_attribute or ""
            self._metrics.setdefault(self.phase, {})[of_epoch] = (path, on_epoch)
            cached = value._forward_cache
            on_epoch, value = False, cached
            on_step = on_step and isinstance(cached, Tensor)
        weight = self.batch_size if batch_size is None else batch_size
        if on_step:
            self.values[of_step] = self.values[name + suffix] = value
            if self.accumulator is not None and self.phase == TRAIN and logger:
                self._of_step.add(of_step)
                self.accumulator.add(of_step, value, weight)
        if on_epoch:
            kept = self._epochs.setdefault(self.phase, MetricAccumulator())
            kept.add(of_epoch, value, weight, _reduction(hook, name, reduce_fx))
            kept.compact()

    def start_step(self, accumulator: MetricAccumulator) -> None:
        """Start an optimizer step: the values of the step before are no longer shown."""
        accumulator.forget(self._of_step)
        self.accumulator = accumulator

    def end_epoch(self, gather: Gather, ranks: int) -> dict[str, float]:
        """Return averages and metrics of the present phase over all ranks, and reset both.

        Collective: every rank calls it.
        """
        found = self._epochs.pop(self.phase, MetricAccumulator()).take(gather)
        logged = self._metrics.pop(self.phase, {})
        for path in dict.fromkeys(path for path, _ in logged.values()):
            names = [name for name, (home, on_epoch) in logged.items() if home == path and on_epoch]
            metric = self._metric(path)
            if names:
                with merged(metric, gather, ranks):
                    found.update(dict.fromkeys(names, float(metric.compute())))
            metric.reset()
        for name, value in found.items():
            tensor = torch.tensor(value)
            self.values[name] = self.values[self._plain.get(name, name)] = tensor
        shown = {name: value for name, value in found.items() if name not in self._hidden}
        return dict(sorted(shown.items()))

    def _metric(self, path: str) -> Metric:
        metric: Any = self.module.get_submodule(path)
        return metric  # type: ignore[no-any-return]

    def state_dict(self, gather: Gather) -> dict[str, Any]:
        """Return everything that a resume in the middle of an epoch needs. Collective."""
        return {
            "of_step": sorted(self._of_step),
            "epochs": {phase: kept.state_dict(gather) for phase, kept in self._epochs.items()},
            "logged": {phase: dict(kept) for phase, kept in self._metrics.items()},
            "plain": dict(self._plain),
            "hidden": sorted(self._hidden),
            "values": {name: float(value) for name, value in self.values.items()},
            "metrics": gather(metric_states(self.module)),
        }

    def load_state_dict(self, state: Mapping[str, Any], rank: int, ranks: int) -> None:
        """Take back what ``state_dict`` returned; rank 0 continues the averages of all ranks."""
        self._of_step, self._hidden = set(state["of_step"]), set(state["hidden"])
        self._plain = dict(state["plain"])
        self._metrics = {
            phase: {name: (path, kept) for name, (path, kept) in logged.items()}
            for phase, logged in state["logged"].items()
        }
        self.values = {name: torch.tensor(value) for name, value in state["values"].items()}
        self._epochs = {}
        for phase, kept in state["epochs"].items():
            self._epochs[phase] = MetricAccumulator()
            self._epochs[phase].load_state_dict(kept if rank == 0 else {})
        load_metric_states(self.module, state["metrics"], rank, ranks)


def _reduction(hook: str, name: str, reduce_fx: Any) -> str:
    given = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")
    if given not in _REDUCTIONS:
        raise TaskError(
            f"self.log({name!r}, reduce_fx={reduce_fx!r}) in {hook}: give 'mean', 'sum', 'min' or "
            "'max', as Lightning takes no other either"
        )
    return _REDUCTIONS[given]


@contextmanager
def merged(metric: Metric, gather: Gather, ranks: int) -> Iterator[None]:
    """Inside, a metric has the state of all ranks, and does not gather it itself. Collective."""
    if ranks == 1:
        yield
        return
    parts = [part for part in metric.modules() if isinstance(part, Metric)]
    before = [(part.sync_on_compute, part._to_sync) for part in parts]
    merge(metric, gather)
    try:
        yield
    finally:
        for part, (alone, synced) in zip(parts, before):
            part.sync_on_compute, part._to_sync = alone, synced


def metric_parts(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    """Yield the metric objects inside a module by name."""
    for name, part in module.named_modules():
        if isinstance(part, Metric):
            yield name, part


def metric_states(module: nn.Module) -> dict[str, Any]:
    """Return the states of the metric objects that have seen a batch, on the CPU."""
    for part in module.modules():
        if isinstance(part, MetricCollection):
            part.values()  # gives metrics that share a state one each
    return {
        name: [part._update_count, {key: to_cpu(getattr(part, key)) for key in part._defaults}]
        for name, part in metric_parts(module)
        if part._update_count
    }


def load_metric_states(
    module: nn.Module, saved: list[dict[str, Any]], rank: int, ranks: int
) -> None:
    """Give metric objects their states of each rank; those of another number of ranks go to rank 0."""
    for name, part in metric_parts(module):
        found = [states[name] for states in saved if name in states]
        part.reset()
        if len(saved) == ranks:
            found = [saved[rank][name]] if name in saved[rank] else []
        elif rank:
            found = []
        if len(found) == 1:
            _set_state(part, *found[0])
        elif found:
            states = [_own_part(part, each) for each in found]
            with merged(part, lambda _, states=states: states, len(saved)):  # type: ignore[misc]
                pass


def _own_part(metric: Metric, state: Any) -> list[Any]:
    """Return the state of one metric as ``merge`` gathers it: with those of metrics inside of it."""
    inner = [part for part in metric.modules() if isinstance(part, Metric)]
    return [state if part is metric else (0, {}) for part in inner]


def _set_state(metric: Metric, count: int, state: Mapping[str, Any]) -> None:
    move: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(metric.device)  # noqa: E731
    for key, value in state.items():
        setattr(metric, key, map_tensors(move, value))
    metric._update_count = count
    metric._computed = None


@contextmanager
def unmeasured(module: nn.Module) -> Iterator[None]:
    """Inside, metric objects may be updated; afterwards they are as before."""
    before = {
        name: [part._update_count, {key: copy.copy(getattr(part, key)) for key in part._defaults}]
        for name, part in metric_parts(module)
    }
    before = map_tensors(torch.clone, before)
    try:
        yield
    finally:
        for name, part in metric_parts(module):
            _set_state(part, *before[name])

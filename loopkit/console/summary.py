"""Summaries: a model layer by layer, and a run at its end."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopkit import rng
from loopkit.console.text import columns, cut, duration, megabytes, number, pad, width

if TYPE_CHECKING:
    from loopkit.run import Progress

_NAME = 40
_PARTS = {"compute": "forward+backward"}


@dataclass(frozen=True)
class Counts:
    """Parameters of a module, each counted once however often it is used.

    Attributes:
        total, trainable: elements.
        size: bytes of parameters and buffers.
        lazy: parameters whose shape is not known yet, which are in no other count.
    """

    total: int
    trainable: int
    size: int
    lazy: int = 0

    def __str__(self) -> str:
        """One line."""
        trained = "all" if self.trainable == self.total else f"{self.trainable:,}"
        text = f"{self.total:,} parameters, {trained} trainable, {megabytes(self.size)}"
        return text + (f"; {self.lazy} more without a shape yet" if self.lazy else "")


def count_parameters(module: nn.Module) -> Counts:
    """The size of ``module``; reads no values, so parameters may be anywhere, on the meta device
    too.
    """
    return _count(module.parameters(), module.buffers())


def _count(parameters: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> Counts:
    parameters, buffers = list(parameters), list(buffers)
    known = [p for p in parameters if not is_lazy(p)]
    stored = [t for t in (*known, *buffers) if not is_lazy(t)]
    return Counts(
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
        kind: its class.
        depth: how deep it lies; the model is at 0.
        counts: of its parameters that no earlier module uses.
        shared: elements of its parameters that an earlier module uses too.
        shape: of its output, with a batch given: ``[32, 10]``, or several of them.
    """

    name: str
    kind: str
    depth: int
    counts: Counts
    shared: int = 0
    shape: str = ""


@dataclass(frozen=True)
class ModelSummary:
    """A model layer by layer. ``str()`` is an aligned table; rich prints it as one of its own.

    Attributes:
        rows: the model and its modules, in the order they were assigned.
        totals: parameters of the whole model.
    """

    rows: tuple[LayerRow, ...]
    totals: Counts

    def header(self) -> list[tuple[str, bool]]:
        """The columns: (name, whether it stands at the right)."""
        found = [("Layer", False), ("Class", False), ("Parameters", True), ("Trainable", True)]
        return [*found, ("Output shape", False)] if any(row.shape for row in self.rows) else found

    def cells(self) -> list[list[str]]:
        """The rows as text, one cell for each column."""
        shaped = len(self.header()) == 5
        return [_cells(row)[: 5 if shaped else 4] for row in self.rows]

    def __str__(self) -> str:
        """An aligned table and a line of totals."""
        names = [name for name, _ in self.header()]
        lines = columns([names, *self.cells()], [right for _, right in self.header()])
        rule = "-" * max(map(width, lines))
        return "\n".join([lines[0], rule, *lines[1:], rule, str(self.totals)])

    def __rich__(self) -> Any:
        """The same as a rich table."""
        return import_module("loopkit.console.rich_table").model_table(self)


def model_summary(module: nn.Module, batch: Any = None, depth: int = 2) -> ModelSummary:
    """What ``module`` consists of, to ``depth`` levels.

    Args:
        batch: what ``predict_step`` takes (of a Task), or ``forward`` (a tuple as its arguments, a
            dict as its named ones). It is run once, in eval mode and without gradients, to see the
            shapes of outputs; mode and random streams are as before afterwards. With meta
            parameters the run is on the meta device, and with lazy ones on a copy.
        depth: levels below the model itself.
    """
    if batch is not None and any(is_lazy(p) for p in module.parameters()):
        module = copy.deepcopy(module)
    shapes = {} if batch is None else _shapes(module, batch)
    seen: set[int] = set()
    owned: dict[str, list[Tensor]] = {}
    shared: dict[str, int] = {}
    for name, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        owned[name] = [p for p in own if id(p) not in seen]
        shared[name] = _count(p for p in own if id(p) in seen).total
        seen.update(map(id, own))
    rows = []
    for name, part in module.named_modules():
        level = name.count(".") + 1 if name else 0
        if level <= depth:
            inside = [
                other
                for other in owned
                if not name or other == name or other.startswith(f"{name}.")
            ]
            counts = _count(p for other in inside for p in owned[other])
            again = sum(shared[other] for other in inside)
            rows.append(
                LayerRow(name, type(part).__name__, level, counts, again, shapes.get(name, ""))
            )
    return ModelSummary(tuple(rows), count_parameters(module))


def _cells(row: LayerRow) -> list[str]:
    counts = row.counts
    name = "  " * row.depth + (row.name.rpartition(".")[2] or "(model)")
    if counts.lazy and not counts.total:
        return [cut(name, _NAME), row.kind, "lazy", "", row.shape]
    total = f"{counts.total:,}" if counts.total or not row.shared else "shared"
    trained = (
        ""
        if not counts.total
        else "yes"
        if counts.trainable == counts.total
        else f"{counts.trainable:,}"
    )
    if counts.total and not counts.trainable:
        trained = "no"
    return [cut(name, _NAME), row.kind, total if total != "0" else "-", trained, row.shape]


def _shapes(module: nn.Module, batch: Any) -> dict[str, str]:
    """The shape of each module's last output, by name."""
    found: dict[str, str] = {}
    modes = [(part, part.training) for part in module.modules()]
    device = next((p.device for p in module.parameters()), None)
    streams = rng.get_state(device)
    if device is not None and device.type == "meta":
        batch = _on_meta(batch)
    handles = [
        part.register_forward_hook(
            lambda _module, _args, out, name=name: found.__setitem__(name, _shape(out))
        )
        for name, part in module.named_modules()
    ]
    try:
        module.eval()
        with torch.no_grad():
            found[""] = _shape(_call(module, batch))
    finally:
        for handle in handles:
            handle.remove()
        for part, training in modes:
            part.training = training
        rng.set_state(streams, device)
    return found


def _call(module: nn.Module, batch: Any) -> Any:
    predict = getattr(module, "predict_step", None)
    if callable(predict):
        return predict(batch)
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


def _on_meta(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.to("meta")
    if isinstance(batch, Mapping):
        return {key: _on_meta(part) for key, part in batch.items()}
    return type(batch)(map(_on_meta, batch)) if isinstance(batch, (tuple, list)) else batch


def _shape(out: Any) -> str:
    if isinstance(out, Tensor):
        return str(list(out.shape))
    if isinstance(out, Mapping):
        return ", ".join(f"{key} {shape}" for key, part in out.items() if (shape := _shape(part)))
    if isinstance(out, (tuple, list)):
        return ", ".join(shape for part in out if (shape := _shape(part)))
    return ""


def result_summary(
    status: str,
    why: str,
    progress: Progress,
    metrics: Mapping[str, float],
    best: Mapping[str, Any],
    timings_us: Mapping[str, float],
    run_dir: object = None,
    checkpoint: object = None,
) -> str:
    """What a run came to, as lines to read.

    Args:
        metrics: the last values by full name; those of the evaluation come in a block of their own.
        best: may hold ``metric`` (or ``name``), ``value``, ``step`` and ``checkpoint``.
        timings_us: microseconds per step on the host by part (``Result.timings``), "step" being
            their sum.
    """
    steps_per_second = progress.step / progress.seconds if progress.seconds else 0.0
    head = {
        "steps": f"{progress.step:,} ({progress.epoch:,} epoch{'s' * (progress.epoch != 1)})",
        "time": f"{duration(progress.seconds)} ({steps_per_second:,.1f} steps/s)",
        "samples": f"{progress.samples:,}"
        + (f", {progress.tokens:,} tokens" if progress.tokens else ""),
        "run": "" if run_dir is None else str(run_dir),
        "checkpoint": "" if checkpoint is None else str(checkpoint),
    }
    blocks = [
        (
            f"{status}: {why}" if why else status,
            {name: text for name, text in head.items() if text},
        ),
        (
            "eval metrics",
            _aligned({name: value for name, value in metrics.items() if name.startswith("eval/")}),
        ),
        (
            "train metrics",
            _aligned({name: value for name, value in metrics.items() if name.startswith("train/")}),
        ),
        ("best", _best(best)),
        ("time per step", _split(timings_us)),
    ]
    cells = max(width(name) for _, lines in blocks for name in lines)
    text = []
    for title, lines in blocks:
        if lines:
            text += [
                f"***** {title} *****",
                *(f"  {pad(name, cells)} = {value}" for name, value in lines.items()),
            ]
    return "\n".join(text)


def _aligned(values: Mapping[str, float]) -> dict[str, str]:
    """Numbers in one column, decimal points below each other where they have four decimals."""
    texts = {name: number(value) for name, value in sorted(values.items())}
    cells = max(map(width, texts.values()), default=0)
    return {name: pad(text, cells, right=True) for name, text in texts.items()}


def _best(best: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(best.get("value"), (int, float)):
        return {}
    name = str(best.get("metric", best.get("name", "value")))
    text = number(best["value"]) + (f" at step {best['step']:,}" if "step" in best else "")
    lines = {name: text}
    if best.get("checkpoint"):
        lines["best checkpoint"] = str(best["checkpoint"])
    return lines


def _split(timings_us: Mapping[str, float]) -> dict[str, str]:
    parts = {_PARTS.get(name, name): us for name, us in timings_us.items() if name != "step"}
    total = timings_us.get("step", sum(parts.values()))
    if not total:
        return {}
    parts["in all"] = total
    rows = [[f"{us:,.0f} µs", f"{us / total:.1%}"] for us in parts.values()]
    return dict(zip(parts, columns(rows, [True, True])))

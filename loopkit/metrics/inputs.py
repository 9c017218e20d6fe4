"""Which outputs of a step the ``update`` of a metric takes, in wrappers and sums of metrics too."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loopkit.errors import MetricError


@dataclass
class MetricInputs:
    """The outputs that one metric takes.

    Attributes:
        positional: keys of the outputs that are passed in this order.
        needed: the names of arguments that are passed by name.
        optional: the names of those that are passed if the step returned them.
    """

    positional: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def all_keys(self) -> tuple[str, ...]:
        """The keys of all outputs that the metric may take."""
        return (*self.positional, *self.needed, *self.optional)

    def of(
        self, outputs: Mapping[str, Any], who: str, step: str
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments for ``update``.

        The weight of the loss is passed only to a metric that cannot do without it.

        Args:
            outputs: what the step returned.
            who: the metric, for messages.
            step: the name of the step, for messages.

        Raises:
            MetricError: the step did not return what the metric needs.
        """
        found = {}
        for key in (*self.positional, *self.needed):
            try:
                found[key] = _at(outputs, key)
            except KeyError:
                raise MetricError(
                    f"the metric {who} asks for {key!r}, but {step} returned "
                    f"{', '.join(map(repr, outputs))}: return it under that name, or name the "
                    f"outputs that it takes: {_example(self)}"
                ) from None
        by_name = {key: found[key] for key in self.needed}
        by_name |= {key: outputs[key] for key in self.optional if key in outputs}
        return [found[key] for key in self.positional], by_name


def named_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any, MetricInputs]]:
    """Yield the metrics of nested dicts, with their keys joined by "/", and what they take.

    Raises:
        MetricError: it is no mapping, or a value is neither a metric, nor a metric with the keys of
            its outputs.
    """
    if not hasattr(metrics, "items"):
        raise MetricError(
            f"metrics() returned {type(metrics).__name__}: return a dict of names to metrics, as "
            "{'accuracy': MulticlassAccuracy(num_classes=10)}"
        )
    yield from _named_metrics(metrics, "")


def _named_metrics(
    metrics: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, MetricInputs]]:
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        metric, *keys = value if isinstance(value, tuple) and value else (value,)
        # A MetricCollection is a mapping as well.
        if _is_metric(metric) and all(isinstance(each, str) for each in keys):
            yield name, metric, MetricInputs(tuple(keys)) if keys else _inputs_of(name, metric)
        elif isinstance(value, Mapping):
            yield from _named_metrics(value, f"{name}/")
        else:
            raise MetricError(
                f"metrics()[{name!r}] is a {type(value).__name__}: give an object with "
                "update, compute and reset, such as a torchmetrics.Metric, or a tuple of it and "
                "the keys of the outputs that it takes; for a function of the whole evaluation, "
                "define compute_metrics(self, outputs)"
            )


def _is_metric(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("update", "compute", "reset"))


def _inputs_of(name: str, metric: Any) -> MetricInputs:
    """Return what ``metric.update`` takes, by the names of its arguments.

    Collections, wrappers and sums pass on whatever they get: the metrics inside of them have the
    names. torchmetrics' transformations of inputs see only what is passed by position.

    Raises:
        MetricError: there are no names, or the metrics inside of it need different arguments and one
            of them is a transformation.
    """
    own = _own_arguments(metric)
    inside = [own] if own else [*_arguments_inside(metric)]
    who = f"the metric {name!r} ({type(metric).__name__})"
    if not inside:
        raise MetricError(
            f"{who} does not say what its update takes: name the outputs: {_example(MetricInputs())}"
        )
    needed = tuple(dict.fromkeys(key for keys, _ in inside for key in keys))
    possible = dict.fromkeys(key for _, keys in inside for key in keys)
    optional = tuple(key for key in possible if key != "weight" and key not in needed)
    if own:
        return MetricInputs((), needed, optional)
    if all(tuple(keys) == needed for keys, _ in inside):
        return MetricInputs(needed, (), optional)
    if any(hasattr(part, "transform_pred") for part in metric.modules()):
        raise MetricError(
            f"{who} transforms inputs, and its metrics take different ones: give each metric a name "
            "of its own"
        )
    return MetricInputs((), needed, optional)


def _own_arguments(metric: Any) -> tuple[list[str], list[str]] | None:
    """Return the needed and the optional arguments of ``update``; None where it names none."""
    needed: list[str] = []
    optional: list[str] = []
    for parameter in inspect.signature(metric.update).parameters.values():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            (needed if parameter.default is parameter.empty else optional).append(parameter.name)
    return (needed, optional) if needed or optional else None


def _arguments_inside(metric: Any) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the arguments of the metrics in a collection, a wrapper, a sum or a list of metrics."""
    children = metric.values() if hasattr(metric, "compute_groups") else _children(metric)
    for part in children:
        own = _own_arguments(part) if _is_metric(part) else None
        if own:
            yield own
        else:
            yield from _arguments_inside(part)


def _children(metric: Any) -> Iterable[Any]:
    if isinstance(metric, Mapping):
        return metric.values()
    return metric.children() if hasattr(metric, "children") else ()


def _at(outputs: Mapping[str, Any], key: str) -> Any:
    """Return the output at ``key``, which may be a path such as "box/preds".

    Raises:
        KeyError: there is none.
    """
    if key in outputs or "/" not in key:
        return outputs[key]
    first, _, rest = key.partition("/")
    inner = outputs[first]
    if not isinstance(inner, Mapping):
        raise KeyError(key)
    return _at(inner, rest)


def _example(inputs: MetricInputs) -> str:
    keys = [f'"my_{key}"' for key in (*inputs.positional, *inputs.needed)] or [
        '"preds"',
        '"target"',
    ]
    return f"(metric, {', '.join(keys)})"

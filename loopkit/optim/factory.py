"""Optimizers by name: one table, and short typed constructors for those used most."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import TypedDict, Unpack

from loopkit.errors import OptionError, missing_extra, nearest
from loopkit.foreign_names import OPTIMIZER_NAMES
from loopkit.keywords import checks_keywords
from loopkit.optim.groups import Group, select
from loopkit.optim.layers import hidden_matrices
from loopkit.optim.schedules import Plateau, Schedule
from loopkit.optim.specs import SETTINGS, Spec, arguments

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD",
    "adafactor": "torch.optim.Adafactor",
    "adagrad": "torch.optim.Adagrad",
    "rmsprop": "torch.optim.RMSprop",
    "nadam": "torch.optim.NAdam",
    "radam": "torch.optim.RAdam",
    "muon": "torch.optim.Muon",
    "lion": "loopkit.optim.lion.Lion",
    "adamw_bf16": "loopkit.optim.kahan.KahanAdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "adam_8bit": "bitsandbytes.optim.Adam8bit",
    "lion_8bit": "bitsandbytes.optim.Lion8bit",
    "sgd_8bit": "bitsandbytes.optim.SGD8bit",
    "rmsprop_8bit": "bitsandbytes.optim.RMSprop8bit",
    "schedule_free_adamw": "schedulefree.AdamWScheduleFree",
    "schedule_free_sgd": "schedulefree.SGDScheduleFree",
    "schedule_free_radam": "schedulefree.RAdamScheduleFree",
}
_EXTRAS = {"bitsandbytes": "quant", "schedulefree": "schedulefree"}


class Settings(TypedDict, total=False):
    """What every constructor takes besides its own arguments; see ``Spec``."""

    weight_decay: float
    schedule: Schedule | Plateau | None
    no_decay: str | Sequence[str]
    params: Any
    groups: Sequence[Group]
    layer_decay: float | None


class FusedSettings(Settings, total=False):
    """And for those that torch has fused: whether to use that kernel; None does so where there is
    one.
    """

    fused: bool | None


def build(name: str, **options: Any) -> Any:
    """A spec of the optimizer called ``name``, or of the class at a path:
    ``build("torch.optim.NAdam", lr=1e-3)``.

    Args:
        options: ``lr``, ``weight_decay`` (by default the class's own) and the other settings of
            ``Spec``; whatever else the class takes.

    Returns:
        A Spec; for "muon" the two that ``Muon`` gives, by name.

    Raises:
        OptionError: no optimizer or option of that name; the nearest one is suggested.
        MissingExtraError: the optimizer is of a package that is not installed.
    """
    return Muon(**options) if name == "muon" else _spec(name, **options)


def find(name: str) -> type[Optimizer]:
    """The optimizer class called ``name``, or at that path.

    Raises:
        OptionError: there is none; names of the Trainer's and near misses are told the right one.
        MissingExtraError: its package is not installed.
    """
    if name not in OPTIMIZERS and "." not in str(name):
        if name in OPTIMIZER_NAMES:
            raise OptionError(
                f"there is no optimizer {name!r}: here that is {OPTIMIZER_NAMES[name]}"
            )
        raise OptionError(
            f"there is no optimizer {name!r}.{nearest(str(name), OPTIMIZERS)} Give one of "
            f"{', '.join(OPTIMIZERS)}, or a class by its path, such as 'torch.optim.NAdam'"
        )
    path = OPTIMIZERS.get(name, name)
    module, _, attribute = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = path.split(".")[0]
        if package in _EXTRAS:
            raise missing_extra(package, _EXTRAS[package], f"the optimizer {name!r}") from error
        raise OptionError(f"the optimizer {name!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise OptionError(f"the optimizer {name!r} is not there: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise OptionError(f"{path} is no torch.optim.Optimizer")
    return kind


@checks_keywords
def AdamW(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **settings: Unpack[FusedSettings],
) -> Spec:
    """Adam with decoupled weight decay, 0.01 by default (Loshchilov and Hutter 2019)."""
    return _spec("adamw", lr=lr, betas=betas, eps=eps, **settings)


@checks_keywords
def Adam(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **settings: Unpack[FusedSettings],
) -> Spec:
    """Adam (Kingma and Ba 2015); its weight decay is an L2 term in the gradient."""
    return _spec("adam", lr=lr, betas=betas, eps=eps, **settings)


@checks_keywords
def SGD(
    lr: float, *, momentum: float = 0.0, nesterov: bool = False, **settings: Unpack[FusedSettings]
) -> Spec:
    """Stochastic gradient descent, with momentum if asked for."""
    return _spec("sgd", lr=lr, momentum=momentum, nesterov=nesterov, **settings)


@checks_keywords
def Adagrad(lr: float = 1e-2, **settings: Unpack[FusedSettings]) -> Spec:
    """Adagrad (Duchi et al. 2011)."""
    return _spec("adagrad", lr=lr, **settings)


@checks_keywords
def RMSprop(
    lr: float = 1e-2, *, alpha: float = 0.99, momentum: float = 0.0, **settings: Unpack[Settings]
) -> Spec:
    """RMSprop (Hinton 2012), with momentum if asked for."""
    return _spec("rmsprop", lr=lr, alpha=alpha, momentum=momentum, **settings)


@checks_keywords
def Adafactor(lr: float = 1e-2, **settings: Unpack[Settings]) -> Spec:
    """Adafactor (Shazeer and Stern 2018), second moments by rows and columns: almost no state.

    ``lr`` is relative: a step moves a matrix by min(lr, 1 / sqrt(step)) times its own root mean
    square.
    """
    return _spec("adafactor", lr=lr, **settings)


@checks_keywords
def Lion(
    lr: float = 1e-4, *, betas: tuple[float, float] = (0.9, 0.99), **settings: Unpack[Settings]
) -> Spec:
    """Lion (Chen et al. 2023): one moment, the sign as update; a rate 3 to 10 times lower than
    AdamW's.
    """
    return _spec("lion", lr=lr, betas=betas, **settings)


@checks_keywords
def AdamWBf16(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **settings: Unpack[Settings],
) -> Spec:
    """AdamW for ``precision="bf16-true"``, with Kahan summation; see ``loopkit.optim.kahan``."""
    return _spec("adamw_bf16", lr=lr, betas=betas, eps=eps, **settings)


@checks_keywords
def AdamW8bit(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    paged: bool = False,
    **settings: Unpack[Settings],
) -> Spec:
    """AdamW with both moments in 8 bits, by blocks (Dettmers et al. 2022); paged: in memory the
    host shares.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    return _spec("adamw_8bit", lr=lr, betas=betas, is_paged=paged, **settings)


@checks_keywords
def ScheduleFree(
    lr: float = 2.5e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    warmup_steps: int = 0,
    **settings: Unpack[Settings],
) -> Spec:
    """Schedule-free AdamW (Defazio et al. 2024): averaging takes the place of a falling rate.

    Evaluations and checkpoints see the averaged weights, training goes on with its own.

    Raises:
        MissingExtraError: schedulefree is not installed.
    """
    return _spec("schedule_free_adamw", lr=lr, betas=betas, warmup_steps=warmup_steps, **settings)


@checks_keywords
def Muon(
    lr: float = 1e-3,
    *,
    adamw_lr: float | None = None,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    betas: tuple[float, float] = (0.9, 0.95),
    **settings: Unpack[Settings],
) -> dict[str, Spec]:
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for embeddings, head, biases and norms.

    Updates are scaled to the root mean square of AdamW's (Liu et al. 2025), so that one rate serves
    both.

    Args:
        adamw_lr: the rate of AdamW's part; None takes ``lr``.
        ns_steps: Newton-Schulz iterations that make the momentum orthogonal.
        betas: of AdamW's part.

    Returns:
        Two specs by name: "muon" and "adamw".

    Raises:
        OptionError: this torch has no Muon (2.9 and later do).
    """
    chosen, decay = settings.pop("params", None), settings.pop("weight_decay", 0.1)

    def hidden(task: nn.Module) -> Iterable[str]:
        return hidden_matrices(task, select(task, chosen, "Muon"))

    def rest(task: nn.Module) -> Iterable[str]:
        among = select(task, chosen, "Muon")
        return among.keys() - hidden_matrices(task, among)

    options = {
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_steps": ns_steps,
        "adjust_lr_fn": "match_rms_adamw",
    }
    common: dict[str, Any] = {"weight_decay": decay, **settings}
    return {
        "muon": _spec("muon", lr=lr, params=hidden, **options, **common),
        "adamw": _spec(
            "adamw", lr=lr if adamw_lr is None else adamw_lr, params=rest, betas=betas, **common
        ),
    }


def _spec(name: str, **options: Any) -> Spec:
    kind = find(name)
    defaults = arguments(kind) or {}
    settings = {key: value for key, value in options.items() if key in SETTINGS}
    for key in ("lr", "weight_decay"):
        if key not in settings and isinstance(defaults.get(key), (int, float)):
            settings[key] = defaults[key]
    if "lr" not in settings:
        raise OptionError(f"{name}: give its learning rate, lr=")
    return Spec(
        kind,
        **settings,
        options={key: value for key, value in options.items() if key not in SETTINGS},
    )

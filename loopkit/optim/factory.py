"""Optimizers by name: one table, and typed constructors for the most common ones."""

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
from loopkit.optim.groups import ParamGroup, select
from loopkit.optim.layers import hidden_matrices
from loopkit.optim.schedules import Plateau, Schedule
from loopkit.optim.specs import SETTINGS, OptimizerSpec, arguments

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD",
    "adafactor": "torch.optim.Adafactor",
    "adagrad": "torch.optim.Adagrad",
    "rmsprop": "torch.optim.RMSprop",
    "nadam": "torch.optim.NAdam",
    "radam": "torch.optim.RAdam",
    "lbfgs": "torch.optim.LBFGS",
    "muon": "torch.optim.Muon",
    "lion": "loopkit.optim.lion.LionOptimizer",
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
# The name in messages where the class is called otherwise than its constructor here.
_SHOWN = {"lion": "Lion", "adamw_bf16": "AdamWBf16", "schedule_free_adamw": "ScheduleFree"}


class Settings(TypedDict, total=False):
    """The arguments that every constructor takes besides its own; see ``OptimizerSpec``."""

    weight_decay: float
    schedule: Schedule | Plateau | None
    no_decay: str | Sequence[str]
    params: Any
    groups: Sequence[ParamGroup]
    layer_decay: float | None


class FusedSettings(Settings, total=False):
    """``Settings``, and whether to use torch's fused kernel; None uses it where there is one."""

    fused: bool | None


def build(name: str, **options: Any) -> Any:
    """Return the spec of an optimizer by its name, or by the path of its class.

    Example::

        build("lion", lr=1e-4)
        build("torch.optim.NAdam", lr=1e-3)

    Args:
        name: a name of ``OPTIMIZERS``, or a path such as "torch.optim.NAdam".
        options: the settings of ``OptimizerSpec`` and the arguments of the class. ``lr`` and
            ``weight_decay`` are by default those of the class.

    Returns:
        An OptimizerSpec; for "muon" the two specs of ``Muon``, by name.

    Raises:
        OptionError: there is no optimizer or no option of that name.
        MissingExtraError: the package of the optimizer is not installed.
    """
    return Muon(**options) if name == "muon" else _spec(name, **options)


def find(name: str) -> type[Optimizer]:
    """Return the optimizer class called ``name``, or at that path.

    Raises:
        OptionError: there is none. For a name of the Trainer, the error gives loopkit's name.
        MissingExtraError: the package of the class is not installed.
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
        raise OptionError(f"there is no optimizer {name!r}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise OptionError(f"{path} is not a torch.optim.Optimizer")
    return kind


@checks_keywords
def AdamW(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **settings: Unpack[FusedSettings],
) -> OptimizerSpec:
    """Return Adam with decoupled weight decay, 0.01 by default (Loshchilov and Hutter 2019)."""
    return _spec("adamw", lr=lr, betas=betas, eps=eps, **settings)


@checks_keywords
def Adam(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **settings: Unpack[FusedSettings],
) -> OptimizerSpec:
    """Return Adam (Kingma and Ba 2015). Its weight decay is an L2 term in the gradient."""
    return _spec("adam", lr=lr, betas=betas, eps=eps, **settings)


@checks_keywords
def SGD(
    lr: float, *, momentum: float = 0.0, nesterov: bool = False, **settings: Unpack[FusedSettings]
) -> OptimizerSpec:
    """Return stochastic gradient descent, with optional momentum."""
    return _spec("sgd", lr=lr, momentum=momentum, nesterov=nesterov, **settings)


@checks_keywords
def Adagrad(lr: float = 1e-2, **settings: Unpack[FusedSettings]) -> OptimizerSpec:
    """Return Adagrad (Duchi et al. 2011)."""
    return _spec("adagrad", lr=lr, **settings)


@checks_keywords
def RMSprop(
    lr: float = 1e-2, *, alpha: float = 0.99, momentum: float = 0.0, **settings: Unpack[Settings]
) -> OptimizerSpec:
    """Return RMSprop (Hinton 2012), with optional momentum."""
    return _spec("rmsprop", lr=lr, alpha=alpha, momentum=momentum, **settings)


@checks_keywords
def Adafactor(lr: float = 1e-2, **settings: Unpack[Settings]) -> OptimizerSpec:
    """Return Adafactor (Shazeer and Stern 2018), which keeps almost no state.

    It keeps second moments by rows and columns. ``lr`` is relative: a step moves a matrix by
    min(lr, 1 / sqrt(step)) times the root mean square of the matrix.
    """
    return _spec("adafactor", lr=lr, **settings)


@checks_keywords
def Lion(
    lr: float = 1e-4, *, betas: tuple[float, float] = (0.9, 0.99), **settings: Unpack[Settings]
) -> OptimizerSpec:
    """Return Lion (Chen et al. 2023), which keeps one moment and moves by its sign.

    Its rate is 3 to 10 times lower than that of AdamW.
    """
    return _spec("lion", lr=lr, betas=betas, **settings)


@checks_keywords
def AdamWBf16(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **settings: Unpack[Settings],
) -> OptimizerSpec:
    """Return AdamW with Kahan summation, for ``precision="bf16-true"``: see ``KahanAdamW``."""
    return _spec("adamw_bf16", lr=lr, betas=betas, eps=eps, **settings)


@checks_keywords
def AdamW8bit(
    lr: float = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    paged: bool = False,
    **settings: Unpack[Settings],
) -> OptimizerSpec:
    """Return AdamW with both moments in 8 bits, quantised by blocks (Dettmers et al. 2022).

    Args:
        lr: the learning rate.
        betas: the decay of the first and of the second moment.
        paged: keep the moments in memory that GPU and CPU share.
        settings: see ``OptimizerSpec``.

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
) -> OptimizerSpec:
    """Return schedule-free AdamW (Defazio et al. 2024), which averages weights at a constant rate.

    Evaluation and checkpoints use the averaged weights. Training continues with its own.

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
) -> dict[str, OptimizerSpec]:
    """Return Muon (Jordan et al. 2024) for the hidden matrices, and AdamW for all other parameters.

    AdamW trains embeddings, head, biases and norms. The updates of Muon are scaled to the root mean
    square of AdamW's (Liu et al. 2025), so that one rate fits both.

    Args:
        lr: the learning rate.
        adamw_lr: the rate of AdamW; None takes ``lr``.
        momentum: the momentum of Muon.
        nesterov: whether the momentum of Muon is Nesterov's.
        ns_steps: Newton-Schulz iterations that make the momentum orthogonal.
        betas: the decay of the moments of AdamW.
        settings: see ``OptimizerSpec``.

    Returns:
        Two specs by name: "muon" and "adamw".

    Raises:
        OptionError: the installed torch has no Muon; torch 2.9 and later have it.
    """
    chosen = settings.pop("params", None)
    decay = settings.pop("weight_decay", 0.1)

    def hidden(task: nn.Module) -> Iterable[str]:
        return hidden_matrices(task, select(task, chosen, "Muon"))

    def rest(task: nn.Module) -> Iterable[str]:
        among = select(task, chosen, "Muon")
        return among.keys() - hidden_matrices(task, among)

    muon = {
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_steps": ns_steps,
        "adjust_lr_fn": "match_rms_adamw",
    }
    common: dict[str, Any] = {"weight_decay": decay, **settings}
    if adamw_lr is None:
        adamw_lr = lr
    return {
        "muon": _spec("muon", lr=lr, params=hidden, **muon, **common),
        "adamw": _spec("adamw", lr=adamw_lr, params=rest, betas=betas, **common),
    }


def _spec(name: str, **options: Any) -> OptimizerSpec:
    kind = find(name)
    defaults = arguments(kind) or {}
    settings = {key: value for key, value in options.items() if key in SETTINGS}
    for key in ("lr", "weight_decay"):
        if key not in settings and isinstance(defaults.get(key), (int, float)):
            settings[key] = defaults[key]
    if "lr" not in settings:
        raise OptionError(f"{name}: give its learning rate, lr=")
    return OptimizerSpec(
        kind,
        **settings,
        options={key: value for key, value in options.items() if key not in SETTINGS},
        name=_SHOWN.get(name, ""),
    )

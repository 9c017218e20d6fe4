"""Unknown keywords: every public constructor refuses them with the name that was meant, or says where
to look."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

import loopkit
from loopkit import Loader, data, hooks, interop, optim
from loopkit.data import Padded, mixed
from loopkit.durations import RunLength
from loopkit.errors import OptionError, nearest
from loopkit.events import Hook
from loopkit.foreign_names import FOREIGN_NAMES, Reason
from loopkit.keywords import checks_keywords
from loopkit.loggers.base import Logger
from loopkit.loggers.registry import LOGGERS
from loopkit.optim.specs import SETTINGS
from tests.support import points

# What a user does not construct, derives a class from, or passes through.
NOT_CALLED = {
    "EpochLoop",
    "EvalLoop",
    "Hook",
    "PredictLoop",
    "Progress",
    "Result",
    "Run",
    "all_gather",
    "StepLoop",
    "Strategy",
    "Task",
    "is_rank_zero",
    "rank_zero_first",
    "rank_zero_only",
}
TAKE_NOTHING = {"ClosureStep", "LRMonitor", "Numerics"}
BY_OTHER_CHECKS = {"Plateau", "Schedule", "OptimizerSpec", "bind", "build", "group_table", "mixed"}


def loggers() -> dict[str, type]:
    found: dict[str, type] = {}
    for module in ("jsonl", "csv", "tensorboard", "wandb", "mlflow", "comet", "clearml", "trackio"):
        members = vars(importlib.import_module(f"loopkit.loggers.{module}")).values()
        found |= {
            kind.__name__: kind
            for kind in members
            if isinstance(kind, type)
            and issubclass(kind, Logger)
            and kind.__module__.endswith(module)
        }
    return found


def constructors() -> dict[str, Any]:
    rooms = (loopkit, hooks, data, interop, optim)
    found = {name: getattr(room, name) for room in rooms for name in room.__all__} | loggers()
    return {n: c for n, c in found.items() if n not in NOT_CALLED | TAKE_NOTHING | BY_OTHER_CHECKS}


CONSTRUCTORS = constructors()
LOGGER_CLASSES = set(loggers().values())
REQUIRED = {
    "Loader": [points(4)], "HFTask": [None], "TensorParallel": [{"a": "colwise"}], "PushToHub": ["me/model"], "SGD": [],
    "Unfreeze": [{"1 epoch": "net"}], "ParamGroup": ["x"], "warm_restarts": [2],
}  # fmt: skip


def takes(constructor: Any) -> set[str]:
    own = set(inspect.signature(constructor).parameters)
    return (
        own | set(SETTINGS)
        if "settings" in own and constructor.__module__ == optim.factory.__name__
        else own
    )


def test_every_logger_is_among_the_constructors():
    assert len(loggers()) == len(LOGGERS)


def hands_on(constructor: Any) -> bool:
    """Whether it hands keywords on to a service, which judges them itself."""
    parameters = inspect.signature(constructor).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters) and constructor in LOGGER_CLASSES


@pytest.mark.parametrize("name", [n for n, c in CONSTRUCTORS.items() if not hands_on(c)])
def test_every_public_constructor_refuses_an_unknown_keyword(name):
    rate = {"lr": 0.1} if name == "SGD" else {}
    with pytest.raises(OptionError, match=r"^\w+ has no option 'no_such_option'"):
        CONSTRUCTORS[name](*REQUIRED.get(name, []), no_such_option=1, **rate)


@pytest.mark.parametrize("owner", FOREIGN_NAMES)
def test_a_foreign_name_is_answered_with_the_one_here_which_exists(owner):
    for name in FOREIGN_NAMES[owner]:
        assert_answered(owner, name)
        assert_exists(owner, name)


def assert_answered(owner, name):
    """A foreign name is refused with the one here."""
    constructor, meant = CONSTRUCTORS[owner], FOREIGN_NAMES[owner][name]
    assert name not in takes(constructor), f"{name} has a meaning of its own here"
    said = f"{owner} has no option '{name}': {'' if isinstance(meant, Reason) else 'here that is '}{meant}"
    with pytest.raises(OptionError, match=f"^{re.escape(said)}$"):
        constructor(*REQUIRED.get(owner, []), **{name: 1})


def assert_exists(owner, name):
    """What a foreign name is here is a name that there is."""
    meant = str(FOREIGN_NAMES[owner][name])
    called = re.findall(r"(\w+)\((\w+)=", meant)
    for constructor, keyword in called:
        if constructor in CONSTRUCTORS:
            parameters = inspect.signature(CONSTRUCTORS[constructor]).parameters
            assert (
                keyword in parameters or keyword in SETTINGS or hands_on(CONSTRUCTORS[constructor])
            ), meant
    for part in re.findall(r"Task\.(\w+)", meant):
        assert hasattr(loopkit.Task, part), meant
    for kind in re.findall(r"\b([A-Z]\w+)\(", meant):
        assert kind in CONSTRUCTORS or kind in ("Block",), meant
    plain = (
        isinstance(FOREIGN_NAMES[owner][name], Reason)
        or "Task." in meant
        or "(" in meant.partition("=")[0]
    )
    first = re.match(r"\w+", meant)[0]
    if not plain and first not in ("the", "F", "an"):
        assert first in takes(CONSTRUCTORS[owner]), meant


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Loader(points(4), workers=2), "Loader has no option 'workers': here that is num_workers"),
        (lambda: Loader(points(4), num_worker=2), "Loader has no option 'num_worker'. Did you mean 'num_workers'?"),
        (lambda: Loader(points(4), wrokers=2), "Loader has no option 'wrokers'. See help(Loader) for its 20 options"),
        (lambda: loopkit.FSDP(cpu_offload=True), "FSDP has no option 'cpu_offload': here that is offload"),
        (lambda: loopkit.FSDP(auto_wrap_policy=None), "FSDP has no option 'auto_wrap_policy': here that is wrap"),
        (lambda: optim.cosine(eta_min=0.1),
         "cosine has no option 'eta_min': give floor=<lowest rate> / lr: floor is a factor of the base rate"),
        (lambda: loopkit.Fit(ema=1), "Fit has no option 'ema': here that is hooks=[EMA()], from loopkit.hooks"),
        (lambda: loopkit.Fit(num_workers=2),
         "Fit has no option 'num_workers': here that is Loader(num_workers=...), returned by Task.train_data"),
        (lambda: loopkit.Fit(logging_first_step=True), "Fit has no option 'logging_first_step': step 1 is always logged"),
        (lambda: loopkit.Fit(nonsense=1), "Fit has no option 'nonsense'. See help(Fit) for its 43 options"),
        (lambda: hooks.EarlyStop(waits=1), "EarlyStop has no option 'waits'. It has metric, patience, min_delta"),
        (lambda: optim.AdamW(learning_rate=1.0), "AdamW has no option 'learning_rate': here that is lr"),
        (lambda: optim.SGD(learning_rate=1.0), "SGD has no option 'learning_rate': here that is lr"),
        (lambda: optim.build("lion", beta1=0.9), "Lion has no option 'beta1': here that is betas=(beta1, beta2)"),
        (lambda: mixed({"a": points(4)}, {"a": 1}, workers=2), "Loader has no option 'workers': here that is num_workers"),
        (lambda: Padded(side="left"), "Padded has no option 'side': here that is padding_side"),
    ],
)  # fmt: skip
def test_what_users_of_other_libraries_type(call, said):
    with pytest.raises(OptionError, match=f"^{re.escape(said)}$"):
        call()


def test_torchs_pct_start_is_our_own():
    assert optim.one_cycle(pct_start=0.2).resolve(RunLength(steps=100))(19) == 1.0


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("precison", ["precision"], "precision"), ("epohcs", ["epochs"], "epochs"), ("FSDP", ["fsdp"], "fsdp"),
        ("fti", ["fit"], "fit"), ("bf61", ["bf16", "fp16"], "bf16"), ("rase", ["raise", "skip"], "raise"),
        ("ema", ["remat", "nodes"], None), ("tpu", ["cpu", "cuda"], None), ("num_workers", ["nodes", "hooks"], None),
        ("--num_workers", ["--nodes"], None), ("x", [], None),
    ],
)  # fmt: skip
def test_only_a_misspelling_is_near(name, known, near):
    assert nearest(name, known) == (f" Did you mean {near!r}?" if near else "")


def test_a_decorated_class_keeps_its_signature_and_its_documentation():
    assert list(inspect.signature(hooks.EarlyStop).parameters) == [
        "metric",
        "patience",
        "min_delta",
    ]
    assert hooks.EarlyStop.__doc__
    assert optim.cosine.__doc__


def test_a_subclass_may_hand_its_keywords_on():
    class Own(hooks.EarlyStop):
        def __init__(self, extra: int, **keywords: Any) -> None:
            super().__init__(**keywords)

    assert Own(1, patience=5).patience == 5
    with pytest.raises(
        OptionError, match=r"EarlyStop has no option 'patiense'\. Did you mean 'patience'"
    ):
        Own(1, patiense=5)


def test_a_constructor_that_hands_names_on_refuses_those_of_the_table_alone():
    @checks_keywords
    def AdamW(lr: float = 0.1, **rest: Any) -> dict[str, Any]:
        return rest

    assert AdamW(anything=1) == {"anything": 1}
    with pytest.raises(OptionError, match="here that is lr"):
        AdamW(learning_rate=1)


def test_a_hook_of_the_users_is_not_checked():
    class Own(Hook):
        def __init__(self, **given: Any) -> None:
            self.given = given

    assert Own(anything=1).given == {"anything": 1}

"""Values of any type as JSON: each is held or described, and none costs the log."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from loopkit import Fit
from loopkit.loggers.jsonl import read_rows
from loopkit.loggers.serialize import flatten, jsonable, to_array
from tests.support import Tiny


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")

    def tolist(self):
        raise RuntimeError("no")


def ring():
    values: list = [1]
    values.append(values)
    return values


def wheel():
    values: dict = {"a": 1}
    values["self"] = values
    return values


STRANGE = {
    "long double": (np.longdouble(0.5), 0.5),
    "complex long double": (np.clongdouble(1 + 2j), "(1+2j)"),
    "long doubles": (np.array([0.5, 0.25], dtype=np.longdouble), [0.5, 0.25]),
    "huge": (10**400, 10**400),
    "longer than Python prints": (1 << 20_000, "int of 20001 bits"),
    "complex": (1 + 2j, "(1+2j)"),
    "meta": (torch.empty(2, 3, device="meta"), "Tensor of shape (2, 3)"),
    "sparse": (torch.eye(2).to_sparse(), "Tensor of shape (2, 2)"),
    "quantised": (
        torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8),
        "Tensor of shape (3,)",
    ),
    "unprintable": (Unprintable(), "Unprintable"),
    "nan": (np.float16("nan"), "nan"),
    "masked": (np.ma.masked, None),
    "ring": (ring(), ...),
    "wheel": (wheel(), ...),
    "object array": (np.array([Unprintable(), "a"], dtype=object), ["Unprintable", "a"]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_value_is_held_or_described(name):
    value, wanted = STRANGE[name]
    found = jsonable({"value": value})
    json.dumps(found, allow_nan=False)
    if wanted is not ...:
        assert found == {"value": wanted}
    assert flatten({"value": value})
    to_array(value)


@pytest.mark.parametrize("loggers", ["jsonl", "csv", "tensorboard"])
@pytest.mark.parametrize("value", [np.longdouble(0.5), 10**400, Unprintable(), wheel()])
def test_a_strange_argument_costs_no_log(tmp_path, value, loggers):
    class Strange(Tiny):
        def __init__(self, value):
            super().__init__()

    result = Fit(
        steps=2,
        run_dir=tmp_path,
        progress=False,
        loggers=("jsonl", loggers) if loggers != "jsonl" else "jsonl",
        checkpoint=False,
    ).run(Strange(value))  # a warning about a dropped logger would be an error here
    assert len(read_rows(tmp_path / "metrics.jsonl")) == len(result.history) > 0


@pytest.mark.parametrize(
    "value", [np.longdouble(0.5), 10**400, -(10**400), np.float16(0.5), True, np.array(2)]
)
def test_a_strange_number_is_logged(tmp_path, value):
    fit = Fit(
        steps=2,
        run_dir=tmp_path,
        progress="plain",
        loggers=("jsonl", "csv", "tensorboard"),
        checkpoint=False,
        eval_every="never",
    )
    fit.on("step_end", lambda run, out: run.log({"own": value}))

    class Measured(Tiny):
        def compute_metrics(self, outputs):
            return {"own": value}

    result = fit.run(Measured())
    wanted = float(value) if abs(value) < 1e300 else float("inf") * (1 if value > 0 else -1)
    assert result.metrics["own"] == wanted
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["own"] == wanted
    assert Fit(progress=False).evaluate(Measured())["eval/own"] == wanted

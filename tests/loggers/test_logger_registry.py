from __future__ import annotations

import subprocess
import sys

import pytest

from loopkit.errors import OptionError
from loopkit.loggers.base import Logger
from loopkit.loggers.csv import CsvLogger
from loopkit.loggers.registry import LOGGERS, build_loggers, check_loggers


def test_names_and_objects_become_loggers_in_order():
    mine = CsvLogger("mine.csv")
    built = build_loggers(("jsonl", mine, "tensorboard"))
    assert [type(logger).__name__ for logger in built] == [
        "JsonlLogger",
        "CsvLogger",
        "TensorBoardLogger",
    ]
    assert built[1] is mine


@pytest.mark.parametrize("name", LOGGERS)
def test_a_single_name_is_one_logger(name):
    (logger,) = build_loggers(name)
    assert isinstance(logger, Logger)
    assert logger.name == name


def test_a_single_object_is_one_logger():
    mine = CsvLogger()
    assert build_loggers(mine) == [mine]


@pytest.mark.parametrize("spec", [None, False, (), []])
def test_nothing_is_no_logger(spec):
    assert build_loggers(spec) == []


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("tensorbord", "Did you mean 'tensorboard'"),
        (["json"], "Did you mean 'jsonl'"),
        (["csv", "csv"], "'csv' twice"),
        ([CsvLogger], "give an instance, with ()"),
        ([3], "derive it from"),
        (True, "derive it from"),
    ],
)
def test_what_is_no_logger_is_refused_with_what_to_do(spec, says):
    with pytest.raises(OptionError, match=says.replace("(", r"\(").replace(")", r"\)")):
        check_loggers(spec)


def test_checking_and_building_import_only_what_is_named():
    code = (
        "import sys; from loopkit.loggers.registry import build_loggers, check_loggers; "
        "check_loggers('tensorboard');"
        "build_loggers(('jsonl', 'csv')); import loopkit.console.summary; from loopkit.console "
        "import build_progress;"
        "build_progress('plain'); import loopkit.hooks.curves;"
        "print([m for m in ('tensorboardX', 'rich', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

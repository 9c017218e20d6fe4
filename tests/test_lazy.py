"""Names that are imported when they are asked for."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from loopkit.lazy import _no_collection

COUNTED = """
import gc
import torch

passes = []
gc.callbacks.append(lambda phase, info: passes.append(info))
from loopkit import Fit, Task

print(len(passes), gc.isenabled())
"""


def test_no_collection_looks_at_torch_in_the_middle_of_the_import():
    done = subprocess.run(
        [sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True
    )
    passes, enabled = done.stdout.split()
    assert int(passes) < 4, "what Python allocates between the names, before and after"
    assert enabled == "True"


@pytest.mark.parametrize("enabled", [False, True])
def test_the_collector_is_left_as_it_was(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), _no_collection(), _no_collection():
            assert not gc.isenabled()
            1 / 0  # noqa: B018
        assert gc.isenabled() == enabled
    finally:
        gc.enable()

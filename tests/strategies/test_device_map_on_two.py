"""device_map with two devices that torch keeps apart gives the numbers of one, and resumes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fork_server
from tests.strategies.second_device import CASES, MAPS, build

# How far losses of about 1 may differ; 1e-6 in fp32.
EXACT = {"bf16": 5e-3, "bf16-true": 0.05, "fp16": 1e-3, "fp64": 1e-12}


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Any:
    if shutil.which("g++") is None or not (Path(torch.__file__).parent / "include/ATen").is_dir():
        pytest.skip(
            "the second device is compiled with g++ and torch's headers, which are not here"
        )
    library = build(request.config.cache.mkdir("second_device"))
    done = fork_server.run(
        [sys.executable, "-m", "tests.strategies.second_device", str(library)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_torch_keeps_the_two_devices_apart(found):
    assert "Expected all tensors to be on the same device" in found["refused"]


@pytest.mark.parametrize("place", MAPS)
@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_one_device(found, case, place):
    one, two = found["cases"][case]["one"], found["cases"][case][place]
    assert len(one["losses"]) >= 8
    assert one["losses"][0] != pytest.approx(one["losses"][-1], abs=1e-2)
    assert two["losses"] == pytest.approx(one["losses"], abs=EXACT.get(case, 1e-6))
    assert two["eval"] == pytest.approx(one["eval"], abs=EXACT.get(case, 1e-6))
    second = {name for name, device in two["places"].items() if device != "cpu"}
    prefixes = [prefix for prefix, device in MAPS[place].items() if device == "second"]
    assert second == {name for name in two["places"] if name.startswith(tuple(prefixes))}
    assert 0 < len(second) < len(two["places"])


def test_auto_fills_both_and_gives_the_same_losses(found):
    two = found["auto"]
    assert two["losses"] == pytest.approx(found["cases"]["plain"]["one"]["losses"], abs=1e-6)
    assert two["places"]["model.blocks.0.up.weight"] == "cpu"
    assert two["places"]["model.blocks.5.up.weight"] == two["places"]["out.weight"] != "cpu"


def test_a_resumed_run_is_the_whole_run_and_its_state_is_beside_its_parameters(found):
    assert found["resumed"]["whole"] == found["resumed"]["resumed"]
    moments = found["resumed"]["moments"]
    assert {name for name, device in moments.items() if device != "cpu"} == {
        n for n in moments if ".blocks." in n
    }


@pytest.mark.parametrize("where", ["in part", "all"])
def test_a_gradient_that_is_not_finite_on_the_second_device_stops_the_run(found, where):
    """With all layers there, the host does not see the flag, as on any accelerator."""
    assert found["poisoned"][where].startswith("step 1 (epoch 0)")
    assert found["poisoned"][where].endswith("as it was")


def test_monitors_and_averages_read_both_devices(found):
    one, two = found["hooked"]
    assert len(one) > 5
    assert two == pytest.approx(one, abs=1e-5)

"""Runs on two devices, the CPU and one made for the tests, with the results on stdout as JSON.

``python -m tests.strategies.second_device SO`` is a process of its own, because torch cannot forget a
device.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

from loopkit import Checkpoint
from loopkit.errors import NotFiniteError
from loopkit.hooks import EMA, GradMonitor
from loopkit.optim import AdamW
from loopkit.strategies.device_map import DeviceMapStrategy
from tests.strategies.test_device_map import Deep
from tests.support import Recorder, digest, quiet

MAPS = {
    "blocks": {"": "cpu", "model.blocks": "second"},
    "mixed": {"": "cpu", "model.blocks.2": "second", "out": "second"},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "clip_norm": {"clip_norm": 0.05}, "clip_value": {"clip_value": 1e-3}, "accumulate": {"accumulate": 2},
    "activation_checkpointing": {"activation_checkpointing": "class:Block"}, "offload": {"activation_checkpointing": "full+offload"}, "ignore": {"on_nan": "ignore"},
    "bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16", "clip_norm": 0.05, "accumulate": 2},
    "bf16-true": {"precision": "bf16-true"}, "fp64": {"precision": "fp64"}, "stream": {"rng": "stream"},
}  # fmt: skip


def build(folder: Path) -> Path:
    """Compile the device with g++ and torch's headers, unless ``folder`` holds it already."""
    source = Path(__file__).with_suffix(".cpp")
    inputs = source.read_bytes() + torch.__version__.encode()
    made = folder / f"{hashlib.sha256(inputs).hexdigest()[:16]}.so"
    if made.exists():
        return made
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    partial = made.with_suffix(f".{os.getpid()}")
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", *include, str(source), *link]
    subprocess.run([*command, "-o", str(partial)], check=True, capture_output=True, text=True)
    partial.replace(made)
    return made


def register(library: str) -> None:
    """Register the device in torch as "second"."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("second")
    module: Any = types.ModuleType("torch.second")
    module.device_count = lambda: 1
    module.is_available = lambda: True
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.get_rng_state = lambda device=0: torch.zeros(1)
    module.set_rng_state = lambda state, device=0: None
    torch._register_device_module("second", module)
    torch.utils.generate_methods_for_privateuse1_backend()


def trained(device_map: Any, **options: Any) -> dict[str, Any]:
    task, trail = Deep(), Recorder()
    result = quiet(
        **{"epochs": 2, "batch_size": 8, "hooks": [trail], "device_map": device_map, **options}
    ).run(task)
    return {
        "losses": [float.fromhex(loss) for _, loss in trail.losses],
        "eval": result.metrics.get("eval/loss"),
        "places": {name: parameter.device.type for name, parameter in task.named_parameters()},
        "weights": digest(task.state_dict()),
    }


class Adaptive(Deep):
    def optimizers(self) -> Any:
        return AdamW(lr=1e-2)


def resumed(device_map: Any) -> dict[str, Any]:
    """Return the end of a whole run, and of one that stopped in the middle and resumed."""
    whole = Adaptive()
    quiet(steps=10, batch_size=8, device_map=device_map).run(whole)
    with tempfile.TemporaryDirectory() as place:
        for last in (4, 10):
            task = Adaptive()
            fit = quiet(
                steps=10,
                batch_size=8,
                device_map=device_map,
                run_dir=place,
                resume="auto",
                checkpoint=Checkpoint(),
            )
            fit.on(
                "step_end",
                lambda run, out, last=last: run.stop("half") if run.progress.step == last else None,
            )
            state: list[Any] = []
            fit.on(
                "fit_end", lambda run, kept=state: kept.append(run.strategy.optimizer_state()[0])
            )
            fit.run(task)
    moments = {
        name: tensor.device.type for name, tensor in state[0].items() if name.endswith("exp_avg")
    }
    return {
        "whole": digest(whole.state_dict()),
        "resumed": digest(task.state_dict()),
        "moments": moments,
    }


def poisoned(device_map: Any) -> str:
    """Return the error for a gradient that is not finite, in a layer on the second device."""
    task = Deep()
    before = digest(task.state_dict())
    fit = quiet(epochs=1, batch_size=8, device_map=device_map)
    # Its weight is another object once it is on the other device.
    layer = task.model.blocks[2].up
    fit.on("fit_start", lambda run: layer.weight.register_hook(lambda grad: grad * float("nan")))
    try:
        fit.run(task)
    except NotFiniteError as error:
        return f"{str(error).partition(':')[0]}; {'changed' if digest(task.state_dict()) != before else 'as it was'}"
    return "trained"


def hooked(device_map: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    fit = quiet(
        steps=4, batch_size=8, log_every=1, device_map=device_map, hooks=[GradMonitor(1), EMA(0.5)]
    )
    fit.on("log", lambda run, logged: values.update(logged))
    fit.run(Deep())
    return {name: value for name, value in values.items() if "grad" in name or name == "eval/loss"}


if __name__ == "__main__":
    register(sys.argv[1])
    try:
        torch.ones(1) + torch.ones(1).to("second")
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    found = {
        name: {"one": trained(None, **options)}
        | {each: trained(device_map, **options) for each, device_map in MAPS.items()}
        for name, options in CASES.items()
    }
    print(
        json.dumps(
            {
                "refused": refused,
                "cases": found,
                "resumed": resumed(MAPS["blocks"]),
                "poisoned": {
                    where: poisoned(device_map)
                    for where, device_map in (("in part", MAPS["blocks"]), ("all", {"": "second"}))
                },
                "auto": trained(
                    None,
                    strategy=DeviceMapStrategy(
                        "auto", [torch.device("cpu"), torch.device("second", 0)]
                    ),
                ),
                "hooked": [hooked(None), hooked(MAPS["mixed"])],
            }
        )
    )

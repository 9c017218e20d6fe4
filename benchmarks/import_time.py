"""Cost of importing loopkit over ``import torch``, and the packages that it must not import.

    python benchmarks/import_time.py

Each measurement is a fresh process. Its clock starts when Python runs and stops after the import.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record

STATEMENTS = {
    "torch": "import torch",
    "loopkit": "from loopkit import Fit, Task",
    "lightning": "import lightning",
    "transformers.Trainer": "from transformers import Trainer",
    "accelerate": "import accelerate",
    "ignite": "import ignite.engine",
    "torchtnt": "import torchtnt.framework",
}
LAZY = ("torchmetrics", "tensorboardX", "rich", "yaml", "docstring_parser", "matplotlib")
TIMED = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"


def python(code: str) -> str:
    """Return the last line that a fresh Python prints when it runs ``code`` in the repository.

    Raises:
        subprocess.CalledProcessError: the code fails.
    """
    # Installed packages are compiled once. A checkout must keep its compiled files too, or the
    # compilation is timed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, cwd=record.ROOT, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="Milliseconds per import, in fresh processes.")
    parser.add_argument(
        "--rounds", type=int, default=9, help="processes of each (default: %(default)s)"
    )
    rounds = parser.parse_args().rounds
    heavy = python(
        f"import sys; {STATEMENTS['loopkit']}; "
        f"print([name for name in {LAZY} if name in sys.modules])"
    )
    installed = {
        name: code for name, code in STATEMENTS.items() if find_spec(name.split(".")[0]) is not None
    }
    for name in STATEMENTS.keys() - installed.keys():
        print(f"left out: {name} is not installed", file=sys.stderr)
    found: dict[str, list[float]] = {name: [] for name in installed}
    for number in range(-1, rounds):  # the first round fills the disk cache
        for name, code in installed.items():
            milliseconds = float(python(TIMED.format(code))) * 1e3
            if number >= 0:
                found[name].append(milliseconds)
    summary = {}
    print(f"{'import':24}{'ms':>8}{'over torch':>12}   quartiles of that")
    for name, values in found.items():
        whole = record.quartiles(values)
        over = record.quartiles([mine - torch for mine, torch in zip(values, found["torch"])])
        summary[name] = {"whole": whole, "over": over}
        quartiles = f"{over['low']:.0f} to {over['high']:.0f}"
        print(f"{name:24}{whole['median']:8.0f}{over['median']:+12.0f}   {quartiles}")
    print(f"imported by loopkit of {', '.join(LAZY)}: {heavy}")
    packages = (
        "torch",
        "loopkit-torch",
        "lightning",
        "transformers",
        "accelerate",
        "pytorch-ignite",
        "torchtnt",
    )
    result = {
        "rounds": rounds,
        "versions": record.versions(packages),
        "milliseconds": summary,
        "heavy": heavy,
    }
    record.save("import_time", result)


if __name__ == "__main__":
    main()

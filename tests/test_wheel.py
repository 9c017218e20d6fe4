"""The wheel is called loopkit-torch, holds the package loopkit alone, and works where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.mark.timeout(300)
def test_a_wheel_installs_and_runs_without_the_checkout(tmp_path):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("loopkit_torch-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        meta = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"loopkit", "loopkit_torch"}
    assert "loopkit/py.typed" in names
    assets = "loopkit/cli/report/assets"
    assert {f"{assets}/page.html", f"{assets}/uplot/LICENSE"} <= set(names)
    assert "\nName: loopkit-torch\n" in meta
    home = tmp_path / "home"
    run(*pip, "install", "--no-deps", "--target", str(home), str(wheel))
    script = (
        "import loopkit, torch\n"
        "from loopkit import Fit, Task\n"
        "from loopkit.optim import SGD\n"
        "class Line(Task):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = torch.nn.Linear(1, 1)\n"
        "    def train_step(self, batch): return self.net(batch).square().mean()\n"
        "    def optimizers(self): return SGD(lr=0.1)\n"
        "    def train_data(self): return [torch.ones(4, 1)] * 3\n"
        "print(loopkit.__file__, Fit(progress=False).run(Line()).step)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(home)}
    said = run(sys.executable, "-c", script, cwd=tmp_path, env=environment).split()
    assert Path(said[0]).is_relative_to(home)
    assert said[1] == "3"
    assert "loopkit" in run(
        sys.executable, "-m", "loopkit", "--version", cwd=tmp_path, env=environment
    )

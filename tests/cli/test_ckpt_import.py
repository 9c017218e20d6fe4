"""``loopkit ckpt import``: weights of torch.save as a checkpoint; code of a file runs only if trusted."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from loopkit import Task
from loopkit.checkpoint import resolve_checkpoint
from loopkit.cli.main import main


class Marker:
    """Leaves a file where it is read, as the code of a bad file would."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Net(Task):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)


@pytest.mark.parametrize("wrapped", [True, False])
def test_weights_are_brought_in(tmp_path, capfd, wrapped):
    net = Net()
    state = OrderedDict(net.state_dict())
    content = {"state_dict": state, "epoch": 2, "global_step": 7, "hyper_parameters": {"lr": 0.1}}
    torch.save(content if wrapped else state, tmp_path / "a.ckpt")
    assert main(["ckpt", "import", str(tmp_path / "a.ckpt"), str(tmp_path / "run")]) == 0
    made = Path(capfd.readouterr().out.strip())
    assert made == resolve_checkpoint(tmp_path / "run")
    assert made.name.endswith("7" if wrapped else "0")
    assert torch.equal(Net.load(made).layer.weight, net.layer.weight)


def test_code_of_the_file_runs_only_with_trust(tmp_path, capfd):
    mark, file, run = tmp_path / "ran", tmp_path / "a.ckpt", str(tmp_path / "run")
    torch.save({"state_dict": Net().state_dict(), "callbacks": Marker(mark)}, file)
    assert main(["ckpt", "import", str(file), run]) != 0
    assert "pass --trust" in capfd.readouterr().err
    assert not mark.exists()
    assert main(["ckpt", "import", str(file), run, "--trust"]) == 0
    assert mark.exists()


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {"state_dict": {}}])
def test_a_file_without_weights_is_refused(tmp_path, capfd, content):
    torch.save(content, tmp_path / "a.pt")
    assert main(["ckpt", "import", str(tmp_path / "a.pt"), str(tmp_path / "run")]) != 0
    assert "holds no state_dict" in capfd.readouterr().err
    assert main(["ckpt", "import", str(tmp_path / "none.pt"), str(tmp_path / "run")]) != 0
    assert "there is no file" in capfd.readouterr().err

"""What every test gets: a directory of its own to run in, and one thread."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Runs go to runs/ in the current directory unless told otherwise."""
    monkeypatch.chdir(tmp_path)

"""What every test gets: a directory of its own to run in, and one thread."""

from __future__ import annotations

import subprocess

import pytest
import torch

from tests import fork_server

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Runs go to runs/ in the current directory unless told otherwise."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def forks(monkeypatch):
    """Python programs that the code under test starts are forked (see tests/fork_server.py)."""
    monkeypatch.setattr(subprocess, "Popen", fork_server.Popen)

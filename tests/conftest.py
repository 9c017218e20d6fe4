"""What tests share: a directory of their own, one thread, and ranks that stay from test to test."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import fork_server, ranks
from tests.ranks import Ranks

torch.set_num_threads(1)


def pytest_configure():
    """Undo what a program in the background, or under nohup, inherits: it ignores these signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> Iterator[Path]:
    """Directories for tests that name none; tmp_path looks at all earlier ones each time."""
    base = tmp_path_factory.mktemp("directories")
    return (base / str(number) for number in count())


@pytest.fixture(autouse=True)
def own_directory(directories, request, monkeypatch):
    """Runs go to runs/ in the current directory unless told otherwise."""
    if "tmp_path" in request.fixturenames:
        directory = request.getfixturevalue("tmp_path")
    else:
        directory = next(directories)
        directory.mkdir()
    monkeypatch.chdir(directory)


@pytest.fixture
def forks(monkeypatch):
    """Fork the Python programs that the code under test starts (see tests/fork_server.py)."""
    monkeypatch.setattr(subprocess, "Popen", fork_server.Popen)


class Pool:
    """``pool(n)`` returns n ranks that stay for the session."""

    def __init__(self) -> None:
        self.started: dict[int, Ranks] = {}

    def __call__(self, size: int) -> Ranks:
        if size not in self.started:
            self.started[size] = Ranks(size)
        return self.started[size]

    def close(self) -> None:
        """Close all ranks."""
        for started in self.started.values():
            started.close()
        self.started = {}


@pytest.fixture(scope="session")
def session_pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def pool(session_pool, request) -> Iterator[Pool]:
    """Ranks of any number. After a failure they may wait for each other: the next test gets new ones."""
    yield session_pool
    if getattr(request.node, "failed", False):
        session_pool.close()


@pytest.fixture
def pair(pool) -> Ranks:
    """Two ranks."""
    return pool(2)


@pytest.fixture
def rank_programs() -> ModuleType:
    """Start programs, by ``run`` and ``Popen``, from the server that has imported what ranks need."""
    return ranks


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    item.failed = getattr(item, "failed", False) or outcome.get_result().failed


def uses_ranks(item: pytest.Item) -> bool:
    """Return whether a test uses ranks that stay, or the server that starts others."""
    return not {"pool", "rank_programs"}.isdisjoint(item.fixturenames)


def shares_with_its_module(item: pytest.Item) -> bool:
    """Return whether a test uses a fixture that is made once for its module."""
    definitions = item._fixtureinfo.name2fixturedefs.values()
    return any(d.scope == "module" for found in definitions for d in found)


# First, because xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Give the tests that use ranks, or their server, to one worker, first: the longest group by far.

    So do tests that share a fixture of their module: otherwise each worker makes it again.
    """
    for item in items:
        if uses_ranks(item):
            item.add_marker(pytest.mark.xdist_group("ranks"))
        elif shares_with_its_module(item):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
    items.sort(key=lambda item: not uses_ranks(item))


def pytest_collection_finish(session):
    """Say so if the groups are lost: two sets of ranks on two cores take the suite far longer."""
    if getattr(session.config.option, "loadgroup", False):
        lost = [item.nodeid for item in session.items if uses_ranks(item)]
        lost = [nodeid for nodeid in lost if not nodeid.endswith("@ranks")]
        if lost:
            raise pytest.UsageError(
                f"pytest {pytest.__version__} and pytest-xdist do not agree on groups: {lost[0]} has none. "
                "Install the versions that pyproject.toml names."
            )

"""The ranks of the contract tests, which start once and stay for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


class Pool:
    """``pool(n)`` returns n processes that stay for the session."""

    def __init__(self) -> None:
        self.started: dict[int, Ranks] = {}

    def __call__(self, size: int) -> Ranks:
        if size not in self.started:
            self.started[size] = Ranks(size)
        return self.started[size]

    def lost(self) -> None:
        """Close all ranks: after a failure they may wait for each other. The next test gets new ones."""
        for ranks in self.started.values():
            ranks.close()
        self.started = {}


@pytest.fixture(scope="session")
def started() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.lost()


@pytest.fixture
def pool(started, request) -> Iterator[Pool]:
    yield started
    if getattr(request.node, "failed", False):
        started.lost()


@pytest.fixture
def pair(pool) -> Ranks:
    """Two ranks."""
    return pool(2)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    item.failed = getattr(item, "failed", False) or outcome.get_result().failed


# First, because xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/contract/" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("ranks"))

"""What the cluster tests share: a run on one machine, and two nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.programs import Program, need, train
from tests.cluster.two_nodes import TwoNodes


class Whole:
    """Two ranks on one machine that are never disturbed: what all other runs must come to.

    Attributes:
        run_dir: the run directory.
        outcome: status, steps, loss and a digest of the weights.
    """

    def __init__(self, directory: Path, under: str) -> None:
        self.run_dir = directory / under
        words = train(self.run_dir, under=under, devices=2)
        self.outcome = Program(words, directory / f"{under}.txt", directory).outcome()


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"), "ddp")


@pytest.fixture(scope="session")
def whole_fsdp(tmp_path_factory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"), "fsdp")


@pytest.fixture
def nodes(tmp_path) -> Iterator[TwoNodes]:
    need("ip", "tc", "unshare")
    both = TwoNodes(tmp_path)
    yield both
    both.close()

"""What a killed launcher leaves in the temporary directory goes with the next one."""

from __future__ import annotations

import os
import tempfile

import pytest

from loopkit.distributed import launch_directory as module
from loopkit.distributed.launch_directory import launch_directory
from loopkit.testing.forks import Forked


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_YOUNG", 0.0)
    return tmp_path


def killed() -> None:
    with launch_directory() as directory:
        (directory / "rank-0.json").write_text("{}")
        os.kill(os.getpid(), 9)


def test_a_killed_launchers_directory_is_removed_and_that_of_a_live_one_is_not(temporary):
    assert Forked(killed).wait().code == -9
    (left,) = temporary.iterdir()
    assert list(left.iterdir())
    with launch_directory() as alive:
        assert not left.exists()
        with launch_directory() as other:
            assert alive.exists()
            assert other != alive
    assert list(temporary.iterdir()) == []


def test_a_link_of_that_name_is_left_alone(temporary, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").write_text("kept")
    (temporary / "loopkit-launch-link").symlink_to(elsewhere)
    with launch_directory():
        pass
    assert (elsewhere / "file").read_text() == "kept"


def test_a_young_directory_may_not_be_locked_yet(temporary, monkeypatch):
    monkeypatch.setattr(module, "_YOUNG", 60.0)
    (temporary / "loopkit-launch-new").mkdir()
    with launch_directory():
        assert (temporary / "loopkit-launch-new").exists()

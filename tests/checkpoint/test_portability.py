"""What Windows and macOS lack is not needed: neither POSIX-only modules nor POSIX-only calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loopkit.checkpoint import Store
from loopkit.checkpoint.store import _open_checked
from loopkit.errors import CorruptCheckpointError

ROOT = Path(__file__).parents[2]

BLOCK_MODULES = """
import sys
for name in ("fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "syslog", "readline"):
    sys.modules[name] = None
"""
# After torch, which was built for the system that this test runs on.
BLOCK_CALLS = """
import os, signal
import torch, torch._dynamo
import filelock, tensorboardX.record_writer, tensorboardX.proto.event_pb2
for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "register_at_fork", "fork",
             "statvfs", "sysconf", "sysconf_names", "pwrite", "posix_fallocate", "sched_getaffinity",
             "getuid", "geteuid", "uname", "killpg", "setsid", "getpgid", "fchmod"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGUSR1", "SIGKILL", "SIGHUP", "SIGALRM", "SIGQUIT"):
    delattr(signal, name)
os.supports_dir_fd = set()
opened = os.open
def open_files_only(path, flags, mode=0o777, *, dir_fd=None):
    assert dir_fd is None
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return opened(path, flags, mode)
os.open = open_files_only
def kill(pid, number):
    raise AssertionError("os.kill ends the process on Windows")
os.kill = kill
"""
TRAIN = """
import importlib, pkgutil, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import loopkit
from loopkit import Fit, Task
for name in loopkit.__all__:
    getattr(loopkit, name)
import loopkit.checkpoint, loopkit.hooks, loopkit.optim, loopkit.loggers.registry, loopkit.cli.main
for room in (loopkit.checkpoint, loopkit.hooks, loopkit.optim):
    for name in room.__all__:
        getattr(room, name)
for module in pkgutil.walk_packages(loopkit.__path__, "loopkit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
sys.path.insert(0, sys.argv[2])
from tests.support import Tiny
options = dict(epochs=1, batch_size=8, progress=False, run_dir=sys.argv[1], checkpoint=True)
result = Fit(**options).run(Tiny())
assert result.status == "finished" and result.checkpoint is not None
again = Fit(**{**options, "epochs": 2}, resume="auto").run(Tiny())
assert (again.epoch, again.status) == (2, "finished")
result.export(Path(sys.argv[1]) / "export")
print("done")
"""


@pytest.mark.parametrize("blocked", ["modules", "calls"])
def test_everything_public_is_imported_and_an_epoch_trained_without(blocked, tmp_path):
    code = {"modules": BLOCK_MODULES, "calls": BLOCK_CALLS}[blocked] + TRAIN
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_where_files_open_by_path_alone_links_are_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "supports_dir_fd", set())
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to(tmp_path / "inside")
    (tmp_path / "inside" / "leaf").symlink_to(tmp_path / "inside" / "file")
    os.close(_open_checked(tmp_path, ["inside", "file"]))
    assert Store().read_bytes(tmp_path, "inside/file", 10) == b"data"
    for name in ("link/file", "inside/leaf"):
        with pytest.raises(CorruptCheckpointError, match="is a link or no regular file"):
            Store().read_bytes(tmp_path, name, 10)
    with pytest.raises(FileNotFoundError):
        Store().read_bytes(tmp_path, "inside/none", 10)

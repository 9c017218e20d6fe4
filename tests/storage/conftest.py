from __future__ import annotations

import asyncio
import base64
import importlib
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from loopkit.storage import mirror, owner, retries
from loopkit.testing.forks import MEMORY
from tests.storage.stores import fit
from tests.support import Tiny, digest, free_port


@pytest.fixture
def tmp_path():
    """A folder in memory, which syncs fast."""
    with tempfile.TemporaryDirectory(prefix="loopkit-storage-", dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Local copies of this test alone, and short pauses."""
    monkeypatch.setenv("LOOPKIT_STAGING", str(tmp_path / "here"))
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retries, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(owner, "LEASE", 0.4)
    monkeypatch.setattr(mirror, "LOGS_EVERY", 0.2)


@pytest.fixture
def other_machine(monkeypatch, tmp_path):
    """A function after which this process has no local copies, as on another machine."""
    count = iter(range(1, 100))
    return lambda: monkeypatch.setenv("LOOPKIT_STAGING", str(tmp_path / f"there-{next(count)}"))


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/store/run"


@pytest.fixture(scope="session")
def on_disk(tmp_path_factory):
    """The same run on a disk, which nothing stops: its directory and the digest of its weights."""
    task = Tiny(noisy=True)
    result = fit(tmp_path_factory.mktemp("disk") / "run").run(task)
    return result.run_dir, digest(task.state_dict())


ACCOUNT, KEY = "account", base64.b64encode(b"the key of a server of tests").decode()


@pytest.fixture(scope="session")
def gs_server():
    """The port of an emulator of Google Cloud Storage."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True)
    server.start()
    # The library pauses for seconds.
    patch = pytest.MonkeyPatch()
    quick = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 100))
    patch.setattr(importlib.import_module("gcsfs.retry"), "asyncio", quick)
    yield port
    patch.undo()
    server.stop()


@pytest.fixture(scope="session")
def az_server(tmp_path_factory):
    """The port of Azurite, which is Azure's own server for tests (npm install -g azurite)."""
    pytest.importorskip("adlfs")
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not installed: npm install -g azurite")
    # The library pauses for 15 seconds and more.
    patch = pytest.MonkeyPatch()
    retry = importlib.import_module("azure.storage.blob.aio").ExponentialRetry
    patch.setattr(retry, "get_backoff_time", lambda self, settings: 0.01)
    port = free_port()
    words = [program, "--inMemoryPersistence", "--blobPort", str(port), "--skipApiVersionCheck"]
    process = subprocess.Popen(
        [*words, "--disableTelemetry"],
        env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "successfully listens" in line:
            break
    yield port
    patch.undo()
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def s3_server():
    """The port of a real S3 server of moto, with a bucket."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    values = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    ours = [t for t in threading.enumerate() if t.name in ("loopkit-upload", "loopkit-owner")]
    for thread in ours:  # after Ctrl-C nobody has waited for it
        thread.join(60)
    assert not any(thread.is_alive() for thread in ours)

"""Runs in real servers of S3, Google's and Azure's stores, behind a proxy that fails and cuts."""

from __future__ import annotations

import os
import random
import signal
import time
import uuid

import pytest

from loopkit.storage import remote_files
from loopkit.storage.copies import open_remote
from loopkit.testing.forks import Forked
from tests.storage.conftest import ACCOUNT, KEY
from tests.storage.stores import LAST, Proxy, fit, held, until
from tests.support import Tiny, digest

FAULTS = ("500", "503", "cut", "lose")


@pytest.fixture(params=["s3", "gs", "az"])
def scheme(request):
    return request.param


@pytest.fixture
def proxy(scheme, request, monkeypatch):
    one = Proxy(request.getfixturevalue(f"{scheme}_server"))
    account = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={one.url}/{ACCOUNT};"
    monkeypatch.setenv("AWS_ENDPOINT_URL", one.url)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", one.url)
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{account}"
    )
    yield one
    one.close()


@pytest.fixture
def place(scheme, proxy):
    """The URL of a run in a new bucket."""
    bucket = f"b{uuid.uuid4().hex}"
    remote = open_remote(f"{scheme}://{bucket}/runs/a")
    remote._files.mkdir(bucket)
    return remote.url


def test_requests_that_fail_and_connections_that_break_change_no_bit(
    place, proxy, on_disk, other_machine, monkeypatch
):
    """A quarter of all requests fails, and Python's generator is not touched by the retries."""
    monkeypatch.setattr(remote_files, "PIECE", 3000)  # files come in several parts
    draw = random.Random(0)
    answers = []

    def fault(number, what):
        answers.append(draw.choice(FAULTS) if draw.random() < 0.25 else "")
        return answers[-1]

    proxy.fault = fault
    until(6, place)
    other_machine()
    task = Tiny(noisy=True)
    fit(place, resume="auto").run(task)
    proxy.fault = lambda number, what: ""
    assert digest(task.state_dict()) == on_disk[1]
    assert set(FAULTS) <= set(answers)
    after = held(place)
    assert LAST in after
    assert all(problems == [] for problems in after.values())


def test_retries_leave_the_generator_of_the_run_alone(place, proxy):
    """The libraries of the stores pause for random times, in a thread beside the run's."""
    remote = open_remote(place)
    proxy.fault = lambda number, what: "503" if len(proxy.log) < 4 else ""
    proxy.log.clear()
    random.seed(5)
    state = random.getstate()
    remote.put("a", b"1")
    assert random.getstate() == state
    assert remote.read("a", 9) == b"1"


def test_a_manifest_is_put_under_a_condition(scheme, place):
    if scheme == "gs":
        pytest.skip("gcp-storage-emulator ignores ifGenerationMatch, which gcsfs sends")
    remote = open_remote(place)
    assert remote.put_new("a", b"1")
    assert remote.put_new("a", b"1")
    assert not remote.put_new("a", b"2")
    assert remote.read("a", 9) == b"1"


class KillAt:
    """Kills a process at a request of it: as the request arrives, or when the server has done it."""

    def __init__(self, count: int, lost: bool) -> None:
        self.count, self.lost, self.pid, self.seen = count, lost, 0, 0

    def __call__(self, number: int, what: str) -> str:
        self.seen += 1
        if self.lost and self.seen == self.count:
            return "lose"
        if self.pid and self.seen == self.count + self.lost:
            os.kill(self.pid, signal.SIGKILL)
            return "cut"
        return ""


def train_until_killed(place: str, machine: str) -> None:
    os.environ["LOOPKIT_STAGING"] = machine
    until(13, place)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("lost", [False, True], ids=["before", "after"])
def test_a_kill_at_any_request_costs_no_bit(place, proxy, on_disk, monkeypatch, tmp_path, lost):
    """Set LOOPKIT_TEST_STRIDE to 10 for every tenth request."""
    stride, count, kills = int(os.environ.get("LOOPKIT_TEST_STRIDE", "1")), 0, 0
    while True:
        count += stride
        url = f"{place}/{count}"
        machines = [str(tmp_path / f"{count}-{n}") for n in range(2)]
        proxy.fault = kill = KillAt(count, lost)
        child = Forked(lambda url=url, machine=machines[0]: train_until_killed(url, machine))
        kill.pid = child.pid
        ended = child.wait(time.monotonic() + 300)
        proxy.fault = lambda number, what: ""
        assert ended.code in (0, -signal.SIGKILL), ended.error
        after = held(url)
        assert all(problems == [] for problems in after.values()), (count, after)
        # On the same machine, or on another one.
        monkeypatch.setenv("LOOPKIT_STAGING", machines[kills % 2])
        task = Tiny(noisy=True)
        fit(url, resume="auto").run(task)
        assert digest(task.state_dict()) == on_disk[1], count
        assert LAST in held(url)
        if ended.code == 0:
            break
        kills += 1
    print(f"{kills} kills")
    assert kills * stride > 20

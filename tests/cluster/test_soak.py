"""Half an hour of random faults on two machines: no bit, row, process or file may differ at the end."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.programs import PYTHON, Program, outcome, train, wait_for
from tests.cluster.test_two_nodes import TIMEOUT, is_still
from tests.cluster.two_nodes import ADDRESSES, TwoNodes

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(4 * 3600)]
MINUTES = float(os.environ.get("LOOPKIT_SOAK_MINUTES", "30"))
SEED = int(os.environ.get("LOOPKIT_SOAK_SEED", "0"))
STEPS = 400
STORE_PORT = 9000


class Site:
    """Two machines, a shared disk, and an S3 store a share of whose requests fails.

    Each method that is named after a fault does it to a run, and returns the node that must be
    killed before the programs can end, or None.
    """

    def __init__(self, nodes: TwoNodes, directory: Path) -> None:
        self.nodes, self.directory = nodes, directory
        self._share = directory / "faults.txt"
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.env = {
            "AWS_ENDPOINT_URL": f"http://{ADDRESSES[0]}:{STORE_PORT}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "LOOPKIT_STAGING": str(directory / "staging"),
        }
        self.requests_fail(0.0)
        words = ["-m", "tests.cluster.store_server", ADDRESSES[0], str(STORE_PORT), "bucket"]
        server = nodes.start(0, [PYTHON, *words, str(self._share)], directory, **self.env)
        server.until("serving as")
        nodes.kept = set(nodes.processes(0))

    def requests_fail(self, share: float) -> None:
        """Let a share of all requests fail."""
        new = self._share.with_suffix(".new")
        new.write_text(str(share))
        new.replace(self._share)

    def start(self, how: str, words: list[str]) -> list[Program]:
        """Start a run on both machines."""
        start = {"torchrun": self._torchrun, "by hand": self.nodes.by_hand}[how]
        env = {**self.env, "TMPDIR": str(self.temporary)}
        return [start(node, words, self.directory, **env) for node in (0, 1)]

    def _torchrun(self, node: int, words: list[str], cwd: Path, **env: str) -> Program:
        return self.nodes.torchrun(node, words, cwd, "--nnodes=2", **env)

    def cut(self, draw: random.Random, both: list[Program]) -> None:
        """Cut the link until both have ended."""
        self.nodes.cut()

    def blink(self, draw: random.Random, both: list[Program]) -> None:
        """Cut the link, and heal it before the limit of a collective."""
        self.nodes.cut()
        wait_for(lambda: is_still(both[0]), "a pause")
        self.nodes.heal()

    def storage(self, draw: random.Random, both: list[Program]) -> None:
        """Let a third of all requests to the store fail, until the run has ended."""
        self.requests_fail(0.33)

    def terminate(self, draw: random.Random, both: list[Program]) -> None:
        """Send SIGTERM to one machine."""
        draw.choice(both).process.terminate()

    def kill_node(self, draw: random.Random, both: list[Program]) -> None:
        """Kill all of one machine at once."""
        self.nodes.kill(draw.randrange(2))

    def kill_process(self, draw: random.Random, both: list[Program]) -> None:
        """Kill one process of a machine."""
        self._signal(draw, signal.SIGKILL)

    def stop_process(self, draw: random.Random, both: list[Program]) -> int:
        """Stop one process of a machine for good."""
        return self._signal(draw, signal.SIGSTOP)

    def _signal(self, draw: random.Random, number: int) -> int:
        node = draw.randrange(2)
        os.kill(draw.choice(self.nodes.processes(node)), number)
        return node

    def end(self, both: list[Program], held: int | None) -> list[int]:
        """Wait for the ends; then nobody may be left. Returns the exit codes."""
        if held is not None:
            # If the agent of torchrun that holds the store is stopped, the other waits for it.
            with suppress(AssertionError):
                both[1 - held].end(180.0)
            self.nodes.kill(held)
        both[0].end()
        # The agent of torchrun on the machine that is cut off would wait until TCP gives up.
        wait_for(
            lambda: both[1].process.poll() is not None or "cannot reach" in both[1].text(),
            "the end of the ranks on node 1",
        )
        self.nodes.heal()
        codes = [program.end() for program in both]
        assert self.nodes.processes(0) + self.nodes.processes(1) == [], "nobody is left"
        self.requests_fail(0.0)
        return codes


# A run continues after these.
HARMLESS = ("blink", "storage")
FATAL = ("cut", "terminate", "kill_node", "kill_process", "stop_process")


def one_life(site: Site, draw: random.Random, words: list[str], counts: Counter[str]) -> str:
    """Start or continue a run, disturb it, and wait for its end; return what rank 0 has printed."""
    how = "torchrun" if draw.random() < 0.2 else "by hand"
    both = site.start(how, words)
    faults = [*(name for name in HARMLESS if draw.random() < 0.4), draw.choice(FATAL)]
    steps, held = 0, None
    done: list[str] = []
    for name in faults:
        steps += draw.randint(3, 60)
        if not reaches(both, steps):
            break
        held = getattr(site, name)(draw, both)
        done.append(name)
        counts[name] += 1
    codes = site.end(both, held)
    text = both[0].text()
    fatal = [name for name in done if name in FATAL]
    if not fatal:
        assert codes == [0, 0], text + both[1].text()
    elif fatal == ["terminate"] and how == "by hand":
        assert set(codes) <= {143, 0}, text + both[1].text()
    return text


def reaches(both: list[Program], steps: int) -> bool:
    """Wait until rank 0 has told so many steps; return False if a program ends before."""

    def ended() -> bool:
        return any(program.process.poll() is not None for program in both)

    wait_for(lambda: ended() or both[0].text().count("\nstep ") >= steps, f"{steps} steps")
    return not ended()


def test_half_an_hour_of_random_faults_changes_no_bit(nodes, tmp_path):
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    draw, counts, lives, runs = random.Random(SEED), Counter(), 0, 0
    words = train("undisturbed", devices=2, steps=STEPS)
    undisturbed = Program(words, tmp_path / "undisturbed.txt", tmp_path).outcome()
    site = Site(nodes, tmp_path)
    shared_memory = names_in(Path("/dev/shm"))
    until = time.monotonic() + 60 * MINUTES
    while time.monotonic() < until:
        runs += 1
        place = f"s3://bucket/run-{runs}" if runs % 2 else f"run-{runs}"
        words = train(place, nodes=2, devices=1, steps=STEPS, timeout=TIMEOUT)
        text = ""
        while "\nend " not in text:
            text = one_life(site, draw, words, counts)
            lives += 1
            print(f"run {runs}, life {lives}: {sum(counts.values())} faults", flush=True)
        assert outcome(text) == undisturbed, f"seed {SEED}, run {runs}"
    print(f"seed {SEED}: {runs} runs, {lives} lives, {dict(counts)}")
    assert names_in(Path("/dev/shm")) <= shared_memory
    # What a killed torchrun leaves is its own, and so is the cache of torch. What a killed launcher
    # of ours leaves goes with the next one, if a minute has passed.
    now = time.time()
    left = {path.name: now - path.stat().st_mtime for path in site.temporary.iterdir()}
    of_torch = ("torchelastic_", "torchinductor_")
    old = {name for name, age in left.items() if age > 300 and not name.startswith(of_torch)}
    assert old == set(), left


def names_in(folder: Path) -> set[str]:
    """Return the names in a folder."""
    return {path.name for path in folder.iterdir()}

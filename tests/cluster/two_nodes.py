"""Two machines on one: network namespaces, each with a host name of its own, joined by a veth pair."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.cluster.programs import PYTHON, Program, wait_for

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400  # of a namespace, where nothing else listens
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]


def ip(*words: str) -> str:
    """Call iproute2's ip."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def tc(*words: str) -> str:
    """Call iproute2's tc."""
    return subprocess.run(["tc", *words], check=True, capture_output=True, text=True).stdout


class TwoNodes:
    """Two machines, node0 and node1.

    Args:
        directory: where the output of programs goes.

    Attributes:
        kept: processes that a node's end leaves alone, such as a server beside the ranks.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._name = f"lk{os.getpid() % 100000}"
        self._programs = 0
        self.kept: set[int] = set()
        self.spaces = [f"{self._name}n{node}" for node in (0, 1)]
        self.links = [f"{self._name}v{node}" for node in (0, 1)]
        try:
            for space in self.spaces:
                ip("netns", "add", space)
            one, two = zip(self.links, self.spaces)
            ip(
                "link",
                "add",
                one[0],
                "netns",
                one[1],
                "type",
                "veth",
                "peer",
                "name",
                two[0],
                "netns",
                two[1],
            )
            for space, link, address in zip(self.spaces, self.links, ADDRESSES):
                ip("-n", space, "link", "set", "lo", "up")
                ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
                ip("-n", space, "link", "set", link, "up")
        except BaseException:
            self.close()
            raise

    def start(self, node: int, words: Sequence[str], cwd: Path, **env: str) -> Program:
        """Start a program on a node."""
        inside = ["ip", "netns", "exec", self.spaces[node], "unshare", "--uts", "sh", "-c"]
        named = f'hostname node{node} && exec "$@"'
        self._programs += 1
        log = self.directory / f"node{node}-{self._programs}.txt"
        env = {"GLOO_SOCKET_IFNAME": self.links[node], **env}
        return Program([*inside, named, "sh", *words], log, cwd, **env)

    def torchrun(
        self, node: int, words: Sequence[str], cwd: Path, *options: str, **env: str
    ) -> Program:
        """Start torchrun with a c10d rendezvous on node 0, one rank on each node."""
        agent = [
            *TORCHRUN, "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=lk",
            f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--local-addr={ADDRESSES[node]}",
            f"--rdzv-conf=is_host={int(node == 0)}", *options, *words[2:],
        ]  # fmt: skip
        return self.start(node, agent, cwd, **env)

    def by_hand(self, node: int, words: Sequence[str], cwd: Path, **env: str) -> Program:
        """Start the script with the variables that loopkit's own launcher reads."""
        meet = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT)}
        return self.start(node, words, cwd, NODE_RANK=str(node), **meet, **env)

    def cut(self) -> None:
        """Cut the link between the nodes."""
        ip("-n", self.spaces[1], "link", "set", self.links[1], "down")

    def heal(self) -> None:
        """Join the nodes again."""
        ip("-n", self.spaces[1], "link", "set", self.links[1], "up")

    def narrow(self, rate: str, limit: str) -> None:
        """Let through few bytes a second in both directions, with a queue of ``limit`` bytes."""
        shape = ["tbf", "rate", rate, "burst", "1600", "limit", limit]
        for space, link in zip(self.spaces, self.links):
            tc("-n", space, "qdisc", "add", "dev", link, "root", *shape)

    def dropped(self) -> int:
        """Return how many packets were lost since ``narrow``."""
        shown = "".join(tc("-s", "-n", space, "qdisc", "show") for space in self.spaces)
        return sum(map(int, re.findall(r"tbf.*?dropped (\d+)", shown, flags=re.DOTALL)))

    def processes(self, node: int) -> list[int]:
        """Return the processes that live on a node, without those in ``kept``."""
        found = [int(pid) for pid in ip("netns", "pids", self.spaces[node]).split()]
        return [pid for pid in found if pid not in self.kept]

    def kill(self, node: int) -> None:
        """Kill every process of a node at once."""
        for pid in self.processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.processes(node), "the end of a node")

    def close(self) -> None:
        """End everything on both nodes, and the nodes."""
        self.kept = set()
        for node, space in enumerate(self.spaces):
            with suppress(subprocess.CalledProcessError):
                self.kill(node)
                ip("netns", "del", space)

"""A real SLURM on this machine: munged, slurmctld and two slurmd, in a directory and on ports of their own."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from loopkit.distributed.job_end import seconds_of
from tests.cluster.programs import environment, wait_for
from tests.support import free_port

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "squeue", "munged", "unshare")
# Two nodes whose names do not follow each other, as in a cluster that has grown.
NODES = ("gpu007", "cpu-12")

CONFIGURATION = """
ClusterName=loopkit
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={here}/munge.sock
SlurmctldPort={ports[0]}
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd-%n.log
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=600
FirstJobId={first}
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=2000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=2000
PartitionName=low Nodes=ALL Default=YES MaxTime=30 State=UP PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=30 State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """A cluster of two nodes.

    Args:
        directory: for everything that it writes; its path must be short, for sockets.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._daemons: list[Path] = []
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (directory / name).mkdir(mode=0o700)
        # Nodes find each other by name, as /etc/hosts or a name server has it on a cluster.
        hosts = Path("/etc/hosts").read_text()
        (directory / "hosts").write_text(f"{hosts}\n127.0.0.1 {' '.join(NODES)}\n")
        ports = [free_port() for _ in range(3)]
        # A port follows from the number of a job: another cluster on this machine has others.
        first = 1000 + os.getpid() % 15000
        about = {
            "first": first,
            "here": directory,
            "host": platform.node(),
            "ports": ports,
            "nodes": NODES,
        }
        (directory / "slurm.conf").write_text(CONFIGURATION.format(**about))
        try:
            self._start_daemons()
        except BaseException:
            self.close()
            raise

    def _start_daemons(self) -> None:
        here, configuration = self.directory, self.directory / "slurm.conf"
        key = here / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = {
            "socket": here / "munge.sock",
            "key-file": key,
            "pid-file": here / "munge" / "pid",
            "log-file": here / "munge" / "log",
            "seed-file": here / "munge" / "seed",
        }
        self._daemon(
            here / "munge" / "pid", "munged", "--force", *(f"--{n}={v}" for n, v in munge.items())
        )
        self._daemon(here / "slurmctld.pid", "slurmctld", "-f", str(configuration))
        for node in NODES:
            # Its tasks see the names of the nodes; this machine's own file stays as it is.
            seeing = f"mount --bind {here / 'hosts'} /etc/hosts && exec slurmd -N {node} -f {configuration}"
            self._daemon(here / f"slurmd-{node}.pid", "unshare", "--mount", "sh", "-c", seeing)
        wait_for(
            lambda: self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split() == ["idle"] * 2,
            "idle nodes",
        )

    def _daemon(self, pid_file: Path, *words: str) -> None:
        self._daemons.append(pid_file)
        path = f"{os.environ['PATH']}:/usr/sbin"
        with (self.directory / "daemons.txt").open("ab") as log:
            subprocess.run(words, check=True, env=environment(PATH=path), stdout=log, stderr=log)
        wait_for(lambda: pid_file.exists() and pid_file.read_text().strip(), f"{words[0]}")

    def environment(self) -> dict[str, str]:
        """Return the variables with which SLURM's programs find this cluster."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def call(self, *words: str, cwd: Path | None = None, check: bool = True) -> str:
        """Call one of SLURM's programs; return what it prints."""
        done = subprocess.run(
            words, cwd=cwd, env=environment(**self.environment()), capture_output=True, text=True
        )
        assert done.returncode == 0 or not check, f"{' '.join(words)}:\n{done.stderr}{done.stdout}"
        return done.stdout

    def submit(self, cwd: Path, script: str, *options: str) -> Job:
        """Submit a batch script; its output goes to out-<job>.txt in ``cwd``."""
        path = cwd / "job.sh"
        path.write_text(script)
        shared = ("--parsable", "--output=out-%A-%a.txt" if any("array" in o for o in options) else "--output=out-%j.txt", "--open-mode=append")  # fmt: skip
        number = self.call("sbatch", *shared, *options, str(path), cwd=cwd).strip()
        return Job(self, number, cwd)

    def cancel_all(self) -> None:
        """Cancel every job, and wait until the nodes are free."""
        self.call("scancel", "--full", "--signal=KILL", "-u", "root", check=False)
        self.call("scancel", "-u", "root", check=False)
        wait_for(lambda: not self.call("squeue", "-h", "-t", "R,CG,PD"), "the end of all jobs")

    def close(self) -> None:
        """End the jobs and the daemons, and wait until they are gone."""
        if (self.directory / "slurmctld.pid").exists():
            with suppress(AssertionError):
                self.cancel_all()
        for pid_file in reversed(self._daemons):
            with suppress(OSError, ValueError):
                pid = int(pid_file.read_text())
                os.kill(pid, signal.SIGTERM)
                wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"end of {pid_file}")
        shutil.rmtree(self.directory, ignore_errors=True)


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: Slurm, number: str, cwd: Path) -> None:
        self._cluster = cluster
        self.number = number
        self._cwd = cwd

    def about(self) -> dict[str, str]:
        """Return what SLURM knows of the job."""
        shown = self._cluster.call("scontrol", "show", "job", "-o", self.number).splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def text(self, suffix: str = "") -> str:
        """Return what the job has printed so far."""
        path = self._cwd / f"out-{self.number}{suffix}.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, text: str) -> None:
        """Wait until the job has printed ``text``."""
        wait_for(lambda: text in self.text() or self.ended(), repr(text))
        assert text in self.text(), self.text()

    def ended(self) -> bool:
        """Return whether the job is over."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return self.about()["JobState"] in over

    def end_soon(self) -> None:
        """Set the time limit to a minute or two from now: a busy machine may take long to start."""
        minutes = seconds_of(self.about()["RunTime"]) // 60 + 2
        self._cluster.call("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    def end(self) -> dict[str, str]:
        """Wait for the end; return what SLURM knows of the job."""
        wait_for(self.ended, f"the end of job {self.number}")
        return self.about()

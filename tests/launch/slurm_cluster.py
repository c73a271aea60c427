"""A Slurm cluster of two nodes on this machine: real munged, slurmctld and two slurmd, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch_helpers import descendants

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SelectType=select/linear
JobRequeue=1
KillWait=5
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    if os.geteuid() != 0:
        return "slurmd needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"{', '.join(absent)} not installed: apt install slurmctld slurmd slurm-client munge" if absent else None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin"


class Cluster:
    """Commands to it.

    Attributes:
        variables: What they need in their environment.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def ask(self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """The output of a command."""
        done = subprocess.run(
            command,
            env={**(environment or os.environ), **self.variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of a job."""
        words = self.ask("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of the logs of the daemons."""
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.log"))


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Two nodes that are idle, and gone afterwards with all of their jobs."""
    # not pytest's folder: a socket's path has at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="dm-slurm-"))
    here, daemons = Cluster(folder), list[subprocess.Popen[bytes]]()
    try:
        _configure(folder)
        munge = [
            f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "log-file")
        ]
        _start(here, daemons, "munged", "--foreground", "--force", *munge, f"--seed-file={folder}/munge.seed")
        _wait(lambda: (folder / "munge.socket").exists(), here)
        _start(here, daemons, "slurmctld", "-D", "-c")
        _start(here, daemons, "slurmd", "-D", "-N", "n0")
        _start(here, daemons, "slurmd", "-D", "-N", "n1")
        _wait(lambda: _idle(here) == 2, here)
        yield here
    finally:
        for daemon in reversed(daemons):
            for pid in [*descendants(daemon.pid), daemon.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> None:
    for name in ("state", "spool-n0", "spool-n1"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    text = CONFIG.format(host=socket.gethostname(), ports=_free_ports(3), folder=folder, cpus=os.cpu_count())
    (folder / "slurm.conf").write_text(text, encoding="utf-8")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _start(here: Cluster, daemons: list[subprocess.Popen[bytes]], *command: str) -> None:
    with (here.folder / f"{command[0]}-{len(daemons)}.out.log").open("wb") as log:
        environment = {**os.environ, **here.variables}
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))


def _idle(here: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%t"],
        env={**os.environ, **here.variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split().count("idle")


def _wait(condition: Callable[[], bool], here: Cluster, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, here.logs()
        time.sleep(0.1)

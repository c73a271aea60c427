"""The debug model, trained on two hosts by launch/torchrun_multi_node.sh, and what its run folder holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from launch_helpers import LAUNCH, ROOT, descendants, finish, read, started
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from two_hosts import TwoHosts

from distmuon.pretrain.metrics import read_metrics

MULTI = ["bash", str(LAUNCH / "torchrun_multi_node.sh")]
STEPS, EVERY = 8, 4
# replicas on the hosts, shards in each
HSDP = ["--parallel.dp_replicate=2", "--parallel.dp_shard=2"]
LOSS = "loss_metrics/global_avg_loss"


def flags_of(folder: Path, *more: str) -> list[str]:
    """A short run of the debug model; Newton-Schulz is in float32, whose last bits alone may differ between layouts."""
    numbers = {"train.steps": STEPS, "checkpoint.every": EVERY, "log.every": 1, "train.threads": 1}
    off = {"train.eval_every": 0, "train.eval_tokens": 2048, "train.sample_tokens": 0, "log.plot": "false"}
    words = {"train.dtype": "float32", "optim.ns_dtype": "float32", "checkpoint.async_save": "false"}
    settings = {**numbers, **off, **words, "log.dir": folder / "runs"}
    config = ["--config", str(ROOT / "configs" / "debug.yaml")]
    return [*config, *(f"--{key}={value}" for key, value in settings.items()), *more]


class Job:
    """The command on both hosts, under way.

    Attributes:
        agents: torchrun on host 0 and on host 1.
        logs: What each has printed.
        folder: Of the job; it holds the run folder and the output of all ranks.
        codes: By host, exit codes of processes that ended and were looked at before torchrun knew of it.
    """

    def __init__(self, agents: Sequence[Any], logs: Sequence[Path], folder: Path) -> None:
        self.agents, self.logs, self.folder = agents, logs, folder
        self.codes: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def end(self) -> None:
        """Wait until it is done on both."""
        codes = [finish(agent, log) for agent, log in zip(self.agents, self.logs, strict=True)]
        assert codes == [0, 0], self.told()

    def all_ended(self, host: int) -> bool:
        """Whether no rank of a host runs any longer; looks at how they ended while torchrun does not know it yet."""
        stats = {pid: _stat(pid) for pid in descendants(self.agents[host].pid)}
        self.codes[host].update({pid: int(stat[-1]) >> 8 for pid, stat in stats.items() if stat[0] == "Z"})
        return all(stat[0] in ("Z", "X") for stat in stats.values())

    def said(self, number: int) -> dict[int, str]:
        """By rank, the errors of the attempt with a number, from the files in which torchrun keeps them."""
        found = {}
        for path in self.folder.glob(f"logs-*/job{number}_*/attempt_0/*/stderr.log"):
            rank = 2 * int(path.relative_to(self.folder).parts[0][-1]) + int(path.parent.name)
            lines = path.read_text(errors="replace").splitlines()
            found[rank] = "\n".join(line for line in lines if line.startswith("error: "))
        return dict(sorted(found.items()))

    def told(self) -> str:
        return "\n".join(read(log)[-5000:] for log in self.logs)


@contextmanager
def job(hosts: TwoHosts, folder: Path, flags: Sequence[str], number: int = 0, **settings: object) -> Iterator[Job]:
    """Start the same command on both hosts; all of it is gone afterwards."""
    names = {"HEAD": hosts.hosts[0].address, "NNODES": 2, "NGPU": 2, "JOB": f"job{number}", "RDZV_TIMEOUT": 100}
    logs = [folder / f"agent-{number}-{host.number}" for host in hosts.hosts]
    commands = [[*host.prefix, *MULTI, *flags] for host in hosts.hosts]
    changes = [{**names, **settings, "LOG_DIR": folder / f"logs-{host.number}"} for host in hosts.hosts]
    with started(commands[1], logs[1], **changes[1]) as second, started(commands[0], logs[0], **changes[0]) as first:
        yield Job((first, second), logs, folder)


def trained(hosts: TwoHosts, folder: Path, *more: str) -> Path:
    """The run folder of an undisturbed run."""
    with job(hosts, folder, flags_of(folder, *HSDP, *more)) as running:
        running.end()
        assert "processes   4: dp_replicate 2 x dp_shard 2" in running.told()
    return folder / "runs" / "debug"


def steps(folder: Path) -> int:
    """The last step that a run folder knows of."""
    path = folder / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(path)), default=0) if path.exists() else 0


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    return {record["step"]: (record[LOSS], record["grad_norm"]) for record in read_metrics(folder / "metrics.jsonl")}


def weights(folder: Path, scratch: Path, step: int = STEPS) -> dict[str, Tensor]:
    """What the model was after a step, by name."""
    dcp_to_torch_save(folder / "checkpoints" / f"step-{step}", scratch / "state.pt")
    found: dict[str, Tensor] = torch.load(scratch / "state.pt", weights_only=False)["app"]["model"]
    return found


def assert_same_run(one: Path, other: Path, scratch: Path) -> None:
    """Bit for bit, the same losses in all steps and the same weights in the end."""
    assert losses(one) == losses(other)
    first, second = weights(one, scratch), weights(other, scratch)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process: its state first, and last how it ended, if nobody has asked for that yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0"]

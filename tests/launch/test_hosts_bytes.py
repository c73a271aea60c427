"""What crosses the cable between two hosts in a step is what `distmuon plan` says, header by header."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks_bytes
import torch
from launch_helpers import finish, read, started
from rich.console import Console
from two_hosts import Counts, NotPermitted, two_hosts

from distmuon.numerics.recipe import Request
from distmuon.planning.devices import find_device
from distmuon.planning.layouts import make_layout
from distmuon.planning.models import Model, of_module
from distmuon.planning.predict import Prediction, predict
from distmuon.planning.report import show
from distmuon.planning.specs import Setup

Found = dict[str, Any]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each host has counted."""
    folder = tmp_path_factory.mktemp("bytes")
    script = [str(Path(ranks_bytes.__file__)), str(folder / "host")]
    try:
        with two_hosts() as both:
            launchers, logs = [], [folder / "agent-0", folder / "agent-1"]
            for host in both.hosts:
                meet = ["--rdzv-backend=static", "--master-addr=10.77.0.1", f"--node-rank={host.number}"]
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
                launchers.append([*host.prefix, *torchrun, *meet, *script])
            names = [{"GLOO_SOCKET_IFNAME": host.cable} for host in both.hosts]
            with (
                started(launchers[0], logs[0], **names[0]) as first,
                started(launchers[1], logs[1], **names[1]) as second,
            ):
                codes = [finish(first, logs[0]), finish(second, logs[1])]
            assert codes == [0, 0], read(logs[0])[-3000:] + read(logs[1])[-3000:]
    except NotPermitted as reason:
        pytest.skip(str(reason))
    return [json.loads((folder / f"host-{number}.json").read_text(encoding="utf-8")) for number in (0, 1)]


def model() -> Model:
    return of_module("a model", ranks_bytes.model())


def predicted(kind: str, dtype: str) -> Prediction:
    """What `distmuon plan --nodes 2 --gpus-per-node 2 --device cpu` would say."""
    wire = getattr(torch, dtype)
    return predict(Setup(model(), make_layout(kind, 2, 2), find_device("cpu", dtype=wire), Request(wire)))


def payload(found: Found) -> float:
    """Bytes of a step without headers and what two barriers and pauses send."""
    steps, idle = (Counts(found[key]["bytes"], found[key]["packets"]).payload for key in ("steps", "idle"))
    return (steps - idle) / ranks_bytes.STEPS


@pytest.mark.parametrize("dtype", ranks_bytes.DTYPES)
@pytest.mark.parametrize("kind", ranks_bytes.KINDS)
def test_bytes_between_hosts_are_those_of_the_plan(counted: list[Found], kind: str, dtype: str) -> None:
    expected = predicted(kind, dtype)
    for host, found in enumerate(counted):
        of_case = found[f"{kind} {dtype}"]
        # namespaces of one machine have one host name, so torchrun's number of the agent tells them apart
        assert of_case["nodes"] == [[0, 1], [2, 3]]
        # what teams say to each other is not in the plan's bytes
        assert of_case["teams"] == []
        between = sum(expected.ranks[rank].sent[1] for rank in (2 * host, 2 * host + 1))
        assert payload(of_case) == pytest.approx(between, rel=0.05)
        # messages of gloo and the agreement on gradients come on top
        assert payload(of_case) > between


@pytest.mark.parametrize("dtype", ranks_bytes.DTYPES)
def test_hosts_that_are_replicas_send_each_other_updates_alone(counted: list[Found], dtype: str) -> None:
    """Shards are gathered inside of the host that owns a matrix, and its update goes to the other one once."""
    itemsize = getattr(torch, dtype).itemsize
    updates = itemsize * sum(parameter.numel for parameter in model().on_muon)
    both = {kind: sum(payload(found[f"{kind} {dtype}"]) for found in counted) for kind in ranks_bytes.KINDS}
    assert both["hsdp"] == pytest.approx(updates, rel=0.05)
    # half of each matrix is stored on the other host, and half of its update returns there
    assert both["fsdp"] == pytest.approx(updates, rel=0.05)
    # two ranks of the other host store all of it, and nothing is gathered
    assert both["ddp"] == pytest.approx(2 * updates, rel=0.05)
    inside = sum(rank.sent[0] for rank in predicted("hsdp", dtype).ranks)
    # half of each matrix to its owner, and half of its update back
    assert inside == updates


def test_the_report_says_it() -> None:
    expected = predicted("ddp", "float32")
    text = io.StringIO()
    show(expected, None, tokens_per_gpu=1, console=Console(width=120, file=text))
    # two copies of 2**20 elements of four bytes
    assert re.search(r"sent between nodes, all ranks together +8 MiB", text.getvalue())
    assert expected.between == expected.summary()["sent_bytes"]["between"] == 8 << 20

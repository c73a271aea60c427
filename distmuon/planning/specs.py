"""From a model, a layout and a device to what a plan is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from distmuon.costing import block_spec, pace_of
from distmuon.numerics.recipe import Request
from distmuon.plan.blocks import Placing
from distmuon.plan.pace import plan_step
from distmuon.plan.parameters import ParameterSpec
from distmuon.plan.plan import Plan
from distmuon.plan.simulate import GLOO, NCCL, Transport
from distmuon.planning.devices import Device
from distmuon.planning.layouts import Layout, holder
from distmuon.planning.models import Model


@dataclass(frozen=True)
class Setup:
    """Everything that a prediction depends on.

    Attributes:
        model: The parameters.
        layout: Who stores what.
        device: How fast ranks and links are.
        request: How matrices are orthogonalized; matrices travel in its dtype.
        bucket_mib: As ``bucket_bytes`` of :class:`distmuon.Muon`, in MiB.
        teams: Whether matrices may have several owners.
        eps: Of the iteration, as it tells buckets apart.
    """

    model: Model
    layout: Layout
    device: Device
    request: Request = field(default_factory=lambda: Request(torch.bfloat16))
    bucket_mib: float = 64.0
    teams: bool = True
    eps: float = 1e-7

    @property
    def itemsize(self) -> int:
        """Bytes of an element that travels."""
        return self.request.dtype.itemsize

    @property
    def transport(self) -> Transport:
        """How collectives are run: by gloo between CPUs, else as NCCL does."""
        return GLOO if self.device.torch_device.type == "cpu" else NCCL

    def but(self, **changes: object) -> Setup:
        """A copy with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]


def plan_of(setup: Setup, specs: Sequence[ParameterSpec]) -> Plan:
    """The plan that the optimizer makes of this."""
    layout, device = setup.layout, setup.device
    pace = pace_of(device.table, device.torch_device, setup.itemsize, setup.transport)
    bound = setup.bucket_mib * 2**20
    return plan_step(specs, ranks=layout.ranks, nodes=layout.node_ranks, bucket_bytes=bound, pace=pace)


def specs_of(setup: Setup) -> list[ParameterSpec]:
    """What :func:`distmuon.plan.plan.build_plan` takes."""
    nodes, device, table = setup.layout.node_ranks, setup.device.torch_device, setup.device.table
    hold = holder(setup.layout)
    placing = Placing()
    found = []
    for parameter in setup.model.on_muon:
        stored = hold(parameter.shape, parameter.stacked)
        for _, block, held in placing.place(parameter.name, parameter.blocks, stored):
            spec = block_spec(
                block,
                held,
                group=parameter.group,
                kind=f"{device.type} float32 {setup.request.coefficients} {setup.request.steps} {setup.eps}",
                device=device,
                request=setup.request,
                table=table,
                nodes=nodes if setup.teams and setup.layout.world > 1 else None,
            )
            found.append(spec)
    return found

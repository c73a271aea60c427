"""The two sides of a check: the sharded model and the single-device one, built alike and given the same gradients."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon.comm.group import Mesh, compute_device, distributed, from_every_rank
from distmuon.comm.layout import as_dtensor, local_tensor, read_layout
from distmuon.muon import Muon
from distmuon.plan.boxes import Box
from distmuon.routing import clean_name

T = TypeVar("T")

SEED = 0


@dataclass(frozen=True)
class Recipe:
    """What the user gave; see :func:`distmuon.check`."""

    model_fn: Callable[[], nn.Module]
    shard_fn: Callable[[nn.Module], nn.Module] | None
    batch_fn: Callable[[nn.Module, int, int], Tensor] | None
    micro_batches: int
    mesh: Mesh | None


@dataclass
class Side:
    """A model and its optimizer.

    Attributes:
        model: As ``shard_fn`` returned it.
        params: Its parameters by clean name.
        optimizer: Over all of them.
        dtype: The narrowest floating-point dtype that modules returned, from when ``backward`` has run.
    """

    model: nn.Module
    params: dict[str, nn.Parameter]
    optimizer: Muon
    dtype: torch.dtype = field(default=torch.float64)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are not frozen."""
        return {name: param for name, param in self.params.items() if param.requires_grad}

    @functools.cached_property
    def algorithms(self) -> dict[str, str]:
        """``"muon"`` or ``"adamw"`` by parameter."""
        return {row.name: row.algorithm for row in self.optimizer.report().rows}


def sharded_side(recipe: Recipe, options: Mapping[str, Any]) -> Side:
    """Build the model, shard it, and give it an optimizer.

    Raises:
        Exception: on every rank, what the user's functions raised on any.
    """

    def build() -> nn.Module:
        model = _fresh(recipe)
        return model if recipe.shard_fn is None else recipe.shard_fn(model)

    model = together(build)
    if not isinstance(model, nn.Module):
        raise TypeError(f"shard_fn returned a {type(model).__name__}: return the sharded (wrapped) module.")
    return Side(model, _by_name(model), Muon(model, mesh=recipe.mesh, **options))


def single_side(recipe: Recipe, options: Mapping[str, Any], sharded: Side) -> Side:
    """Build the model again, on the device on which the sharded one computes.

    Raises:
        ValueError: if the two have different parameters.
    """
    model = together(lambda: _fresh(recipe))
    stored = next(iter(sharded.params.values())).device
    dtensors = [as_dtensor(param) for param in sharded.params.values()]
    model.to(compute_device([dtensor.device_mesh for dtensor in dtensors if dtensor is not None], stored))
    side = Side(model, _by_name(model), Muon(model, **options))
    for name in side.params.keys() ^ sharded.params.keys():
        where, other = ("model_fn", "shard_fn") if name in side.params else ("shard_fn", "model_fn")
        raise ValueError(
            f"parameter {name!r} is in the model of {where} and not in that of {other}: parameters are compared by "
            "name, so build all of them in model_fn and let shard_fn only shard."
        )
    for name, param in side.params.items():
        if param.shape != sharded.params[name].shape:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(param.shape)} after model_fn and {sharded.params[name].shape} "
                "after shard_fn: shard with DTensors (fully_shard, parallelize_module), which keep the whole shape."
            )
    return side


def together(function: Callable[[], T], kinds: tuple[type[Exception], ...] = ()) -> T:
    """Call a function of the user on all ranks; an error on one is raised on all, so that none waits for it.

    Args:
        function: What may fail on some ranks only, before its first collective or on all ranks after it.
        kinds: Exceptions that keep their type on the ranks that did not raise them; others become a RuntimeError.

    Raises:
        Exception: what it raised here, or else the text of the lowest rank that failed, with its number.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    told = every_rank(None if error is None else (type(error).__name__, str(error)))
    if error is not None:
        raise error
    by_name = {kind.__name__: kind for kind in kinds}
    for rank, found in enumerate(told):
        if found is not None:
            kind, text = found
            raise by_name.get(kind, RuntimeError)(f"rank {rank}: {kind}: {text}")
    return result  # type: ignore[return-value]


def every_rank(value: T) -> list[T]:
    """The picklable value of every rank."""
    group = dist.group.WORLD if distributed() else None
    return [value] if group is None else from_every_rank(value, group)


def whole(tensor: Tensor) -> Tensor:
    """All elements of a tensor, gathered by the ranks of its mesh together."""
    dtensor = as_dtensor(tensor)
    with torch.no_grad():
        return tensor.detach() if dtensor is None else dtensor.full_tensor()


def describe_layout(param: Tensor) -> str:
    """Placements and mesh in a few characters, such as ``"R, S(0) on 2x4"``."""
    dtensor = as_dtensor(param)
    if dtensor is None:
        return "whole"
    placements = ", ".join(map(str, dtensor.placements))
    return f"{placements} on {'x'.join(map(str, dtensor.device_mesh.shape))}"


def plan_owners(side: Side) -> dict[str, str]:
    """Who orthogonalizes the matrices of each parameter on Muon, once a step was made: the ranks, or ``"each"``."""
    owners: dict[str, set[int]] = {}
    alone = set()
    binding = side.optimizer._binding
    for plan in [] if binding is None else [part.pipeline.plan for part in binding.parts]:
        for bucket in plan.buckets:
            for assignment in bucket.assignments:
                name = plan.parameters[assignment.parameter].name
                owners.setdefault(name, set()).add(assignment.owner)
                if len(plan.ranks) == 1:
                    alone.add(name)
    return {name: "each" if name in alone else ",".join(map(str, sorted(ranks))) for name, ranks in owners.items()}


def give_drawn_gradients(side: Side, step: int) -> None:
    """Set gradients that depend on name and step alone; a shard gets its part."""
    for name, param in side.trained.items():
        digest = hashlib.sha256(f"{name} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        drawn = torch.randn(param.shape, generator=generator)
        box = read_layout(name, param, None).box
        with torch.no_grad():
            grad = torch.zeros_like(param)
        local_tensor(grad).copy_(drawn[box.within(Box.whole(param.shape))])
        param.grad = grad


def backward(side: Side, recipe: Recipe, step: int, *, at_once: bool = False) -> None:
    """Set gradients from the user's batches.

    Args:
        side: The sharded side.
        recipe: With a ``batch_fn``.
        step: Counted from 1.
        at_once: One backward pass of the sum of all losses, in place of one for each micro batch.
    """
    batch_fn = recipe.batch_fn
    assert batch_fn is not None
    side.optimizer.zero_grad()
    handles = [module.register_forward_hook(_watch_dtype(side)) for module in side.model.modules()]

    def run() -> None:
        if at_once:
            losses = [batch_fn(side.model, step, number) for number in range(recipe.micro_batches)]
            functools.reduce(torch.add, losses).backward()
            return
        for number in range(recipe.micro_batches):
            batch_fn(side.model, step, number).backward()

    try:
        together(run)
    finally:
        for handle in handles:
            handle.remove()


def whole_gradients(side: Side) -> dict[str, Tensor]:
    """The gradients of all parameters that have one on any rank, gathered; a rank without one adds zeros."""
    present = {name for name, param in side.params.items() if param.grad is not None}
    anywhere = set().union(*every_rank(present))
    gradients = {}
    for name, param in side.params.items():
        if name in anywhere:
            with torch.no_grad():
                grad = torch.zeros_like(param) if param.grad is None else param.grad
            gradients[name] = whole(grad)
    return gradients


def _fresh(recipe: Recipe) -> nn.Module:
    torch.manual_seed(SEED)
    model = recipe.model_fn()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model_fn returned a {type(model).__name__}: return the torch.nn.Module, not yet sharded.")
    for name, param in model.named_parameters():
        if param.is_meta:
            raise ValueError(
                f"parameter {name!r} of model_fn is on the meta device, and a check needs its values: build the model "
                "with weights, smaller if it is too large for one device."
            )
    return model


def _by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return {clean_name(name): param for name, param in model.named_parameters()}


def _watch_dtype(side: Side) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            side.dtype = max(side.dtype, output.dtype, key=lambda dtype: torch.finfo(dtype).eps)

    return hook

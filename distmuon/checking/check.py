"""The check: what is built, stepped and compared, in which order."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon._version import __version__
from distmuon.checking.compare import (
    agreed,
    default_tolerance,
    elementwise_tolerance,
    largest_entry,
    relative,
    same_everywhere,
    state_measures,
    weight_measure,
)
from distmuon.checking.report import CheckLine, CheckReport, Measure, ParameterRow, line, worst
from distmuon.checking.sides import (
    Recipe,
    Side,
    backward,
    describe_layout,
    give_drawn_gradients,
    plan_owners,
    sharded_side,
    single_side,
    whole,
    whole_gradients,
)
from distmuon.comm.group import Mesh, distributed, own_rank
from distmuon.comm.layout import local_tensor
from distmuon.numerics.update import resolve_lr_scale

Found: TypeAlias = "dict[str, Measure]"

_REPORT_IT = "leave out options and modules until it passes, and report what is left with this table"


def check(
    model_fn: Callable[[], nn.Module],
    shard_fn: Callable[[nn.Module], nn.Module] | None = None,
    *,
    batch_fn: Callable[[nn.Module, int, int], Tensor] | None = None,
    steps: int = 3,
    micro_batches: int = 2,
    mesh: Mesh | None = None,
    tolerance: float | None = None,
    **muon_options: Any,
) -> CheckReport:
    """Prove on a model and mesh that the sharded update of :class:`distmuon.Muon` is the single-device one.

    Every rank of the job calls this together, with the same arguments; one process without a process group is
    enough for a model that is not sharded. Every rank builds the whole model beside its shards, so the model must
    fit one device: check the layout of a large model on a small one of the same kinds of layers.

    What is proved, each a line of the report:

    - *start*: ``shard_fn`` leaves the weights of ``model_fn`` as they are.
    - *exact*: with ``foreach=False``, weights and optimizer state are those of one device after every step, bit
      for bit.
    - *update*: so they are with the options that were given, within ``tolerance``, on drawn gradients.
    - *replicas*: all ranks end with the same whole weights.
    - *accumulation*: the gradients of ``micro_batches`` backward passes are those of one pass over the sum of
      their losses, within the square root of the precision of the forward pass. Only with ``batch_fn``.
    - *resume*: state saved and loaded through :mod:`torch.distributed.checkpoint.state_dict` into a fresh model
      and optimizer goes on bit for bit.

    Torch's random number generators are seeded before ``model_fn``, and left so.

    Args:
        model_fn: Builds the model with its weights, the same on every rank, on any device but meta.
        shard_fn: Shards it as the training does (``fully_shard``, ``parallelize_module``,
            ``DistributedDataParallel``), and returns what the training would give to the optimizer. None: the
            model is taken as it is.
        batch_fn: ``batch_fn(model, step, micro_batch)`` gives the scalar loss of a batch, with ``step`` from 1 and
            ``micro_batch`` from 0; both sides then step with the gradients of the sharded model. None: gradients
            are drawn from a normal distribution, by the name of the parameter and the step, and no forward pass is
            run.
        steps: Optimizer steps.
        micro_batches: Backward passes of a step, with ``batch_fn``.
        mesh: As for :class:`distmuon.Muon`: over which plain parameters are replicated.
        tolerance: Allowed error of the path that was asked for, relative to the largest movement of a weight. None:
            0.125 for Newton-Schulz in bfloat16, 0.02 in float16, 1e-4 in float32, and two roundings to the wire's
            dtype; 16 roundings for AdamW and for state. One rounding of the weights a step comes on top.
        **muon_options: Arguments of :class:`distmuon.Muon`; ``lr`` is 0.02 and ``adamw_lr`` 0.001 if left out.

    Returns:
        The report, the same on every rank.

    Raises:
        TypeError, ValueError: for arguments that do not go together, or what :class:`distmuon.Muon` refuses.
        Exception: on every rank, what a function of the caller raised on any.
    """
    if steps < 1 or micro_batches < 1:
        raise ValueError(f"steps={steps} and micro_batches={micro_batches}: take 1 or more of each.")
    options = _with_rates(muon_options)
    recipe = Recipe(model_fn, shard_fn, batch_fn, micro_batches, mesh)
    exact = _compare(recipe, {**options, "foreach": False, "compile": False, "fused": None}, steps, 0.0)
    asked = exact
    if options.get("foreach") is not False:
        # gradients of small batches are nearly of low rank, and Newton-Schulz makes updates of their rounding noise
        asked = _compare(replace(recipe, batch_fn=None), options, steps, tolerance)
    lines = (
        line(
            "start",
            "the sharded weights are those of model_fn, bit for bit",
            "make the weights in model_fn, alike on every rank, and let shard_fn only shard",
            list(exact.start.items()),
        ),
        line("exact", f"{steps} steps of one device, bit for bit (foreach=False)", _REPORT_IT, exact.measures),
        _update_line(exact, asked, steps),
        line(
            "replicas",
            "all ranks hold the same weights",
            "hand over the DistributedDataParallel module, or mesh=, and average gradients over the replicas",
            [*exact.replicas.items(), *asked.replicas.items()],
        ),
        _accumulation(recipe, options),
        _resume(recipe, options, steps),
    )
    return CheckReport(_setting(recipe, asked), lines, _rows(exact, asked))


@dataclass(frozen=True)
class _Compared:
    """What is left of two sides that were stepped with the same gradients and compared after every step.

    Attributes:
        start: By parameter, how far weights are apart before the first step; the worst of all ranks.
        weights: The worst of all steps and ranks.
        state: The same of the optimizer state.
        replicas: Whether ranks agree after the last step.
        facts: Algorithm, layout and owner.
        device: Where the single side is.
    """

    start: Found
    weights: Found
    state: Found
    replicas: Found
    facts: dict[str, tuple[str, str, str]]
    device: torch.device

    @property
    def measures(self) -> list[tuple[str, Measure]]:
        """By parameter, weights before state."""
        return [(name, found[name]) for name in self.weights for found in (self.weights, self.state)]


def _compare(recipe: Recipe, options: Mapping[str, Any], steps: int, tolerance: float | None) -> _Compared:
    sharded = sharded_side(recipe, options)
    single = single_side(recipe, options, sharded)
    start = _align(sharded, single)
    begin = {name: param.detach().clone() for name, param in single.params.items()}
    bars = dict.fromkeys(begin, tolerance) if tolerance is not None else _default_bars(single, options)
    weights: dict[str, list[Measure]] = {name: [] for name in begin}
    state: dict[str, list[Measure]] = {name: [Measure(0.0, 0.0, "state")] for name in begin}
    for step in range(1, steps + 1):
        _give_gradients(sharded, recipe, step)
        gradients = whole_gradients(sharded)
        for name, param in single.params.items():
            param.grad = gradients[name].to(param.device, copy=True) if name in gradients else None
        sharded.optimizer.step()
        single.optimizer.step()
        for name, param in single.params.items():
            found = whole(sharded.params[name])
            weights[name].append(weight_measure(found, param, begin[name], bars[name], step))
            state[name] += state_measures(name, sharded, single, tolerance, step)
    owners = plan_owners(sharded)
    return _Compared(
        start=start,
        weights=agreed({name: worst(found) for name, found in weights.items()}),
        state=agreed({name: worst(found) for name, found in state.items()}),
        replicas=same_everywhere(sharded),
        facts={
            name: (sharded.algorithms[name], describe_layout(param), owners.get(name, ""))
            for name, param in sharded.params.items()
        },
        device=next(iter(single.params.values())).device,
    )


def _align(sharded: Side, single: Side) -> Found:
    """Compare weights before the first step, and let the single side begin where the sharded one does."""
    found: Found = {}
    for name, param in single.params.items():
        gathered = whole(sharded.params[name]).to(param.device)
        note = "" if gathered.dtype == param.dtype else f"{gathered.dtype} where model_fn has {param.dtype}"
        error = relative(gathered, param, largest_entry(param))
        found[name] = Measure(error, 0.0, "weights", 0, own_rank(), note)
        # what is wrong here is told once, and not again with every step
        param.data = gathered.clone()
    return agreed(found)


def _default_bars(single: Side, options: Mapping[str, Any]) -> dict[str, float]:
    ns_dtype = options.get("ns_dtype", torch.bfloat16)
    wire_dtype = options.get("wire_dtype") or ns_dtype
    return {
        name: default_tolerance(ns_dtype, wire_dtype, param.device)
        if single.algorithms[name] == "muon"
        else elementwise_tolerance(param.dtype)
        for name, param in single.params.items()
    }


def _give_gradients(side: Side, recipe: Recipe, step: int) -> None:
    if recipe.batch_fn is None:
        give_drawn_gradients(side, step)
    else:
        backward(side, recipe, step)


def _update_line(exact: _Compared, asked: _Compared, steps: int) -> CheckLine:
    if asked is exact:
        return CheckLine("update", None, "foreach=False asks for the exact path")
    name, measure = max(asked.weights.items(), key=lambda item: item[1].error)
    how = f"largest error {measure.error:.1e} of the movement ({name})" if measure.error else "bit for bit too"
    return line(
        "update",
        f"{steps} steps of one device with the given options, drawn gradients, {how}",
        _REPORT_IT,
        asked.measures,
    )


def _accumulation(recipe: Recipe, options: Mapping[str, Any]) -> CheckLine:
    """Compare the gradients of several backward passes with those of one."""
    if recipe.batch_fn is None:
        return CheckLine("accumulation", None, "pass batch_fn to check it")
    side = sharded_side(recipe, options)
    backward(side, recipe, 1)
    apart = {name: grad.clone() for name, grad in whole_gradients(side).items()}
    backward(side, recipe, 1, at_once=True)
    at_once = whole_gradients(side)
    narrowest = max((side.dtype, *(grad.dtype for grad in at_once.values())), key=lambda dtype: torch.finfo(dtype).eps)
    bar = float(torch.finfo(narrowest).eps) ** 0.5
    found: Found = {}
    for name in apart.keys() | at_once.keys():
        if name not in apart or name not in at_once:
            found[name] = Measure(float("inf"), bar, "gradient", 1, own_rank(), "one of the two ways has none")
            continue
        error = relative(apart[name], at_once[name], largest_entry(at_once[name]))
        found[name] = Measure(error, bar, "gradient", 1, own_rank())
    found = agreed({name: found[name] for name in side.params if name in found})
    largest = max((measure.error for measure in found.values()), default=0.0)
    detail = f"{recipe.micro_batches} micro batches are one large batch, largest error {largest:.1e}, bar {bar:.1e}"
    advice = "batch_fn must depend on its arguments alone and leave gradients as they are"
    return line("accumulation", detail, advice, list(found.items()))


def _resume(recipe: Recipe, options: Mapping[str, Any], steps: int) -> CheckLine:
    """Save after half of the steps, load into a fresh model and optimizer, and compare the shards at the end."""
    # slow to import, and only a check needs it
    from torch.distributed.checkpoint import state_dict as dcp

    saved_after = max(1, steps // 2)
    last = max(steps, saved_after + 1)
    side = sharded_side(recipe, options)
    saved: dict[str, Any] = {}
    recorded: dict[int, dict[str, Tensor | None]] = {}
    for step in range(1, last + 1):
        _give_gradients(side, recipe, step)
        if step > saved_after:
            recorded[step] = {name: _clone(param.grad) for name, param in side.params.items()}
        side.optimizer.step()
        if step == saved_after:
            saved["model"] = copy.deepcopy(dcp.get_model_state_dict(side.model))
            saved["optimizer"] = copy.deepcopy(dcp.get_optimizer_state_dict(side.model, side.optimizer))
    fresh = sharded_side(recipe, options)
    dcp.set_model_state_dict(fresh.model, saved["model"])
    dcp.set_optimizer_state_dict(fresh.model, fresh.optimizer, saved["optimizer"])
    for gradients in recorded.values():
        for name, param in fresh.params.items():
            param.grad = gradients[name]
        fresh.optimizer.step()
    found: Found = {}
    for name, param in side.params.items():
        ours, theirs = side.optimizer.state.get(param, {}), fresh.optimizer.state.get(fresh.params[name], {})
        pairs: list[tuple[str, Tensor | None, Tensor | None]] = [("weights", fresh.params[name], param)]
        pairs += [(key, theirs.get(key), ours.get(key)) for key in sorted(ours.keys() | theirs.keys())]
        found[name] = worst(_same_shard(what, a, b, last) for what, a, b in pairs)
    detail = f"state saved after step {saved_after} and loaded goes on to step {last}, bit for bit"
    return line("resume", detail, _REPORT_IT, list(agreed(found).items()))


def _same_shard(what: str, found: Tensor | None, expected: Tensor | None, step: int) -> Measure:
    if found is None or expected is None:
        note = "it is missing after loading" if found is None else "it is there only after loading"
        return Measure(float("inf"), 0.0, what, step, own_rank(), note)
    mine = local_tensor(expected)
    return Measure(relative(local_tensor(found), mine, largest_entry(mine)), 0.0, what, step, own_rank())


def _clone(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().clone()


def _with_rates(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in learning rates that move weights well above rounding."""
    filled = {"lr": 0.02, **options}
    if options.get("adamw_lr") is None and resolve_lr_scale(options.get("adjust_lr_fn")) != "match_rms_adamw":
        filled["adamw_lr"] = 0.001
    return filled


def _rows(exact: _Compared, asked: _Compared) -> tuple[ParameterRow, ...]:
    return tuple(
        ParameterRow(
            name, *facts, worst((exact.weights[name], exact.state[name])), asked.weights[name], asked.state[name]
        )
        for name, facts in asked.facts.items()
    )


def _setting(recipe: Recipe, asked: _Compared) -> str:
    world = dist.get_world_size() if distributed() else 1
    gradients = "drawn gradients" if recipe.batch_fn is None else "gradients of batch_fn"
    versions = f"distmuon {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{world} rank{'s' * (world > 1)} on {asked.device.type}, {gradients}, {versions}"

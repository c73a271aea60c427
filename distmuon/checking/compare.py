"""How far two sides are apart, and how far they may be."""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.checking.report import Measure, worst
from distmuon.checking.sides import Side, every_rank, whole
from distmuon.comm.group import own_rank
from distmuon.numerics.hardware import compute_dtype

# Largest entry of the difference over the largest entry, after 5 iterations on normal matrices in batches or one by
# one: 0.044 in bfloat16, 0.004 in float16, 3e-6 in float32 and 1e-14 in float64 were seen (tests/test_check.py)
ITERATION_ERROR = {torch.bfloat16: 0.125, torch.float16: 0.02, torch.float32: 1e-4, torch.float64: 1e-12}


def default_tolerance(ns_dtype: torch.dtype, wire_dtype: torch.dtype, device: torch.device) -> float:
    """How far batched updates of two batch sizes may be apart, relative to the movement of the weights.

    Args:
        ns_dtype: What matrices are rounded to.
        wire_dtype: What updates are rounded to on their way.
        device: Where matrices are multiplied.
    """
    return ITERATION_ERROR[compute_dtype(ns_dtype, device)] + 2 * torch.finfo(wire_dtype).eps


def elementwise_tolerance(dtype: torch.dtype) -> float:
    """How far elementwise updates of equal gradients may be apart: by their vector units' order of roundings."""
    return 16 * torch.finfo(dtype).eps


def weight_measure(found: Tensor, expected: Tensor, begin: Tensor, tolerance: float, step: int) -> Measure:
    """Compare weights; the error is relative to the largest movement of a weight since ``begin``.

    Args:
        found: Of the sharded side, whole.
        expected: Of the single-device side.
        begin: Of both, before the first step.
        tolerance: Allowed error; 0.0 asks for the same bits. Else one rounding of the weights a step comes on top.
        step: Counted from 1.
    """
    movement = _largest(expected, begin)
    bar = tolerance
    if tolerance > 0.0 and movement > 0.0:
        bar += step * torch.finfo(expected.dtype).eps * largest_entry(expected) / movement
    return Measure(relative(found, expected, movement), bar, "weights", step, own_rank())


def state_measures(name: str, sharded: Side, single: Side, tolerance: float | None, step: int) -> list[Measure]:
    """Compare all tensors of a parameter's optimizer state; errors are relative to the largest entry.

    Args:
        name: Of the parameter.
        sharded: Its state is gathered, by all ranks together.
        single: The other side.
        tolerance: Allowed error; None: that of elementwise updates, since state sees equal gradients.
        step: Counted from 1.
    """
    theirs = sharded.optimizer.state.get(sharded.params[name], {})
    ours = single.optimizer.state.get(single.params[name], {})
    measures = []
    for key in sorted(theirs.keys() | ours.keys()):
        if key not in theirs or key not in ours:
            where = "sharded" if key in theirs else "single-device"
            note = f"only the {where} optimizer has it"
            measures.append(Measure(float("inf"), 0.0, key, step, own_rank(), note))
            continue
        found, expected = whole(theirs[key]), ours[key].detach()
        bar = elementwise_tolerance(expected.dtype) if tolerance is None else tolerance
        error = relative(found, expected, largest_entry(expected))
        measures.append(Measure(error, bar, key, step, own_rank()))
    return measures


def relative(found: Tensor, expected: Tensor, scale: float) -> float:
    """Largest absolute difference over ``scale``; 0.0 for equal tensors, infinite for anything not finite."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return float("inf")
    difference = _largest(found.to(expected.device), expected)
    if difference == 0.0:
        return 0.0
    # a comparison with NaN is false
    return difference / scale if scale > 0.0 and difference < float("inf") else float("inf")


def largest_entry(tensor: Tensor) -> float:
    """Largest absolute value; 0.0 of nothing."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def agreed(found: dict[str, Measure]) -> dict[str, Measure]:
    """For each parameter the worst measure of all ranks, in the order of this rank's, the same everywhere."""
    ranks = every_rank(found)
    names = dict.fromkeys(name for theirs in ranks for name in theirs)
    return {name: worst(theirs[name] for theirs in ranks if name in theirs) for name in names}


def same_everywhere(side: Side) -> dict[str, Measure]:
    """Whether all ranks hold the same whole weights, by two checksums of their bits."""
    own = {name: _checksum(whole(param)) for name, param in side.params.items()}
    ranks = every_rank(own)
    measures = {}
    for name in own:
        seen = [theirs.get(name) for theirs in ranks]
        differing = [rank for rank, checksum in enumerate(seen) if checksum is not None and checksum != seen[0]]
        if differing and seen[0] is not None:
            measures[name] = Measure(float("inf"), 0.0, "weights", 0, differing[0], "they differ from those of rank 0")
        else:
            measures[name] = Measure(0.0, 0.0, "weights")
    return agreed(measures)


def _largest(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in float32 or wider."""
    if a.numel() == 0:
        return 0.0
    wide = torch.promote_types(a.dtype, torch.float32)
    return float((a.detach().to(wide) - b.detach().to(wide)).abs().max())


def _checksum(tensor: Tensor) -> tuple[int, int]:
    """Sum and weighted sum of the elements' bits, modulo 2**64: one changed element always changes them."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(integers[flat.element_size()]).to(torch.int64)
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return int(bits.sum()), int((bits * places).sum())

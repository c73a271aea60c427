"""Which learning rate does a matrix get, and which one stands for that of AdamW?"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distmuon.groups import Group, Params, as_groups, bare_params, group_names
from distmuon.matrices import Matrices, blocks_in
from distmuon.numerics.update import lr_scale, resolve_lr_scale
from distmuon.plan.matrices import MatrixSpec
from distmuon.routing import clean_name

# Root mean square of AdamW's update over its learning rate, as Moonlight takes it (arXiv 2502.16982, section 2.2)
ADAMW_RMS = 0.2


@dataclass(frozen=True)
class ShapeRate:
    """What all matrices of one shape have in common.

    Attributes:
        rows: Output features.
        cols: Input features.
        count: Matrices of this shape in the model.
        lr: Their ``lr`` by which an update is as large as AdamW's, in root mean square over elements.
    """

    rows: int
    cols: int
    count: int
    lr: float

    @property
    def numel(self) -> int:
        """Elements of all of them."""
        return self.count * self.rows * self.cols


@dataclass(frozen=True)
class SuggestedRates:
    """What to give :class:`distmuon.Muon` so that steps are as large as those of AdamW; ``str()`` tells it all.

    Attributes:
        lr: For the matrices: of :attr:`shapes`, the median over elements.
        adamw_lr: For everything else.
        adjust_lr_fn: The scale that ``lr`` goes with.
        weight_decay: For the matrices; ``lr * weight_decay`` is AdamW's.
        adamw_weight_decay: For everything else.
        shapes: The rate of each shape, the largest part of the model first.
        reason: Why, in a sentence or two.
    """

    lr: float
    adamw_lr: float
    adjust_lr_fn: str
    weight_decay: float
    adamw_weight_decay: float
    shapes: tuple[ShapeRate, ...]
    reason: str

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :class:`distmuon.Muon`."""
        names = ("lr", "adamw_lr", "adjust_lr_fn", "weight_decay", "adamw_weight_decay")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        given = ", ".join(
            f"{name}={value!r}" if isinstance(value, str) else f"{name}={value:.4g}"
            for name, value in self.arguments().items()
        )
        cells = [("matrices", "elements", "lr", "of the lr given")]
        for shape in self.shapes:
            size = f"{shape.count} of {shape.rows} x {shape.cols}"
            cells.append((size, f"{shape.numel:,}", f"{shape.lr:.4g}", f"{shape.lr / self.lr:.2f}"))
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([f"distmuon.Muon(model, {given})", "", *(line.rstrip() for line in lines), "", self.reason])


def suggest_lr(
    params: Params,
    *,
    adamw_lr: float,
    weight_decay: float = 0.1,
    adjust_lr_fn: str | None = "match_rms_adamw",
    muon_names: Sequence[str] = (),
    adamw_names: Sequence[str] = (),
    matrices: Matrices = None,
) -> SuggestedRates:
    """Learning rates and decays with which Muon moves a matrix as far as AdamW moves it.

    AdamW's update has a root mean square of about ``0.2 * adamw_lr`` an element, and Muon's one of
    ``lr * scale / sqrt(max(rows, cols))`` (Moonlight, arXiv 2502.16982). Setting them equal gives ``lr``. It is where
    to begin; the best rate of a run may be another.

    Args:
        params: A module, named parameters or groups, as :class:`distmuon.Muon` takes them; their shapes alone are read,
            so that the meta device will do.
        adamw_lr: The learning rate at which this model trains well under AdamW.
        weight_decay: AdamW's decoupled decay. It multiplies the learning rate in both algorithms, so that the decay
            of a step stays what it was only if ``lr * weight_decay`` does.
        adjust_lr_fn: The scale that the rate is wanted for (:func:`distmuon.numerics.update.lr_scale`).
        muon_names: As :class:`distmuon.Muon` takes them.
        adamw_names: As :class:`distmuon.Muon` takes them.
        matrices: As :class:`distmuon.Muon` takes it.

    Raises:
        TypeError, ValueError: as :class:`distmuon.Muon` raises them for ``params``.
        ValueError: for a rate or decay out of range, an unknown scale, and a model of which nothing goes to Muon.
    """
    for key, value in (("adamw_lr", adamw_lr), ("weight_decay", weight_decay)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{key}={value!r} is a {type(value).__name__}: it takes a number.")
    if not 0 < adamw_lr < math.inf:
        raise ValueError(f"adamw_lr={adamw_lr}: give the learning rate of an AdamW run, a number above 0.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay}: it must be 0 or more.")
    scale = resolve_lr_scale(adjust_lr_fn)
    groups, _ = as_groups(params, muon_names=muon_names, adamw_names=adamw_names, matrices=matrices)
    shapes = _shape_rates(_specs(groups), scale, adamw_lr)
    if not shapes:
        raise ValueError("no parameter goes to Muon, so that there is nothing to suggest: use torch.optim.AdamW.")
    lr = _median(shapes)
    return SuggestedRates(
        lr, adamw_lr, scale, weight_decay * adamw_lr / lr, weight_decay, shapes, _reason(scale, shapes)
    )


def group_lrs(group: Group, name: str, param: Tensor) -> dict[str, float]:
    """The effective learning rates of a parameter in its group: of AdamW's, or of each of its blocks, by name."""
    lr = float(group["lr"])
    if not group["use_muon"]:
        return {name: lr}
    specs = [block.matrices for block in blocks_in(group, name, param)]
    return {spec.parameter: lr * lr_scale(group["adjust_lr_fn"], *spec.logical) for spec in specs}


def effective_lr(groups: Sequence[Group], wanted: Tensor | str) -> float:
    """See :meth:`distmuon.Muon.effective_lr`."""
    if not isinstance(wanted, Tensor | str):
        raise TypeError(f"effective_lr takes a parameter or its name, not {type(wanted).__name__}.")
    known: list[str] = []
    for index, group in enumerate(groups):
        for name, param in zip(group_names(group, f"group {index}"), group["params"], strict=True):
            is_it = param is wanted
            if is_it:
                return _one_of(name, group_lrs(group, name, param))
            if isinstance(wanted, str) and clean_name(wanted).partition("[")[0] == name:
                rates = group_lrs(group, name, param)
                known += rates
                if clean_name(wanted) in (name, *rates):
                    return rates[clean_name(wanted)] if clean_name(wanted) in rates else _one_of(name, rates)
            known.append(name)
    if isinstance(wanted, Tensor):
        shape = " x ".join(map(str, wanted.shape)) or "scalar"
        raise ValueError(
            f"the parameter of shape {shape} is not in this optimizer: pass one of its own (wrappers such as FSDP "
            "replace those of the model), or a name."
        )
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"names look like {', '.join(known[:3])}."
    raise ValueError(f"this optimizer has no parameter {wanted!r}: {hint}")


def _one_of(name: str, rates: Mapping[str, float]) -> float:
    """The rate of all blocks of a parameter."""
    if len(set(rates.values())) > 1:
        told = ", ".join(f"{lr:.3g} of {block!r}" for block, lr in rates.items())
        raise ValueError(f"the blocks of {name!r} have rates of their own ({told}): ask for one of them by its name.")
    return next(iter(rates.values()))


def _specs(groups: Sequence[Group]) -> list[MatrixSpec]:
    return [
        block.matrices
        for index, group in enumerate(groups)
        if group["use_muon"]
        for name, param in zip(group_names(group, f"group {index}"), bare_params(group), strict=True)
        for block in blocks_in(group, name, param)
    ]


def _shape_rates(specs: Sequence[MatrixSpec], scale: str, adamw_lr: float) -> tuple[ShapeRate, ...]:
    counts: dict[tuple[int, int], int] = {}
    for spec in specs:
        counts[spec.logical] = counts.get(spec.logical, 0) + spec.count
    rates = []
    for (rows, cols), count in counts.items():
        # with match_rms_adamw the factors cancel, and the rate is AdamW's to the last bit
        factor = 1.0 if scale == "match_rms_adamw" else ADAMW_RMS * math.sqrt(max(rows, cols))
        lr = adamw_lr * factor / (1.0 if scale == "match_rms_adamw" else lr_scale(scale, rows, cols))
        rates.append(ShapeRate(rows, cols, count, lr))
    return tuple(sorted(rates, key=lambda rate: -rate.numel))


def _median(shapes: Sequence[ShapeRate]) -> float:
    """The rate in the middle, where a shape weighs as much as it has elements."""
    half, seen = sum(shape.numel for shape in shapes) / 2, 0
    for shape in sorted(shapes, key=lambda shape: shape.lr):
        seen += shape.numel
        if seen >= half:
            return shape.lr
    raise AssertionError("the last shape completes the sum")


def _reason(scale: str, shapes: Sequence[ShapeRate]) -> str:
    if scale == "match_rms_adamw":
        return (
            "adjust_lr_fn='match_rms_adamw' gives the update of every matrix the root mean square of AdamW's, about "
            f"{ADAMW_RMS} times the rate (arXiv 2502.16982), so that one rate and one decay serve both."
        )
    low, high = (function(shape.lr for shape in shapes) for function in (min, max))
    text = (
        f"with adjust_lr_fn={scale!r} an update has the root mean square of AdamW's, about {ADAMW_RMS} times its rate "
        "(arXiv 2502.16982), at a rate that depends on the shape"
    )
    if high / low < 1.001:
        return f"{text}; the matrices of this model share one."
    return (
        f"{text}: from {low:.4g} to {high:.4g} in this model, and lr is the median over elements. Groups with rates of "
        "their own, or adjust_lr_fn='match_rms_adamw', fit every shape."
    )

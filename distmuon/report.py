"""The routing table: what each parameter got, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distmuon.groups import Group, group_names
from distmuon.learning_rates import group_lrs
from distmuon.matrices import blocks_between, blocks_in, looks_fused
from distmuon.numerics.recipe import choose
from distmuon.numerics.variants import by_rows, has_moments
from distmuon.options import Options
from distmuon.pipeline import Pipeline
from distmuon.plan.reading import Reading
from distmuon.plan.words import count_blocks, describe
from distmuon.presets import Preset
from distmuon.routing import Route


@dataclass(frozen=True)
class RoutingRow:
    """One parameter.

    Attributes:
        name: Its clean name.
        shape: Its global shape.
        matrices: What Muon reads it as, output x input features, such as ``"8 of 768 x 512"`` or
            ``"768 + 256 + 256 x 768 (rows: q | k | v)"``, and with a ``block_period`` the blocks between whole steps;
            empty for AdamW.
        algorithm: ``"muon"``, ``"adamw"``, the ``lmo`` of its group, or the class of the optimizer that
            :func:`distmuon.wrap` got.
        reason: Which rule decided.
        lr: The effective learning rate: that of the group times the scale of the matrix shape; of blocks that differ
            the largest.
        lrs: The rate of each block; empty where there is but one.
    """

    name: str
    shape: tuple[int, ...]
    matrices: str
    algorithm: str
    reason: str
    lr: float
    lrs: tuple[float, ...] = ()


@dataclass(frozen=True)
class RoutingReport:
    """Every parameter of an optimizer, in the order of its groups; ``str()`` is a table."""

    rows: tuple[RoutingRow, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        header = ("parameter", "shape", "matrices", "algorithm", "reason", "lr")
        cells = [header]
        for row in self.rows:
            shape = " x ".join(map(str, row.shape)) or "scalar"
            lrs = " | ".join(dict.fromkeys(f"{lr:.3g}" for lr in row.lrs or (row.lr,)))
            cells.append((row.name, shape, row.matrices, row.algorithm, row.reason, lrs))
        widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([line.rstrip() for line in lines] + ["", self.summary, *self.notes])

    @property
    def summary(self) -> str:
        """One sentence: parameters and elements on each algorithm."""
        parts = []
        # beside Muon is AdamW, or the optimizer that distmuon.wrap got
        others = dict.fromkeys(row.algorithm for row in self.rows if row.algorithm != "muon") or ("adamw",)
        for algorithm in ("muon", *others):
            rows = [row for row in self.rows if row.algorithm == algorithm]
            elements = sum(_numel(row.shape) for row in rows)
            parts.append(f"{algorithm}: {len(rows)} parameters, {elements:,} elements")
        return "; ".join(parts)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def build_report(
    groups: Sequence[Group], routes: Mapping[str, Route], options: Options, pipelines: Sequence[Pipeline]
) -> RoutingReport:
    """Say of every parameter what it gets and why, with effective learning rates as they are now.

    Args:
        groups: The parameter groups of an optimizer.
        routes: Of the parameters that were routed.
        options: The settings of the optimizer.
        pipelines: Of its steps, once they are known.
    """
    rows = []
    for index, group in enumerate(groups):
        label = f"group {index}"
        for name, param in zip(group_names(group, label), group["params"], strict=True):
            route = routes.get(name)
            reason = route.reason if route is not None else f"{label} says so"
            lrs = tuple(group_lrs(group, name, param).values())
            matrices, algorithm = "", group["lmo"] or "adamw"
            if group["use_muon"]:
                matrices, algorithm = _told(group, name, param, route), "muon"
            blocks = lrs if len(lrs) > 1 else ()
            rows.append(RoutingRow(name, tuple(param.shape), matrices, algorithm, reason, max(lrs), blocks))
    notes = [
        *_unread(groups, routes),
        *_look_fused(groups, routes),
        *_variant_notes(groups),
        *_engine_notes(groups, options, pipelines),
        *(_plan_note(pipeline) for pipeline in pipelines),
    ]
    return RoutingReport(tuple(rows), tuple(notes))


def _told(group: Group, name: str, param: torch.Tensor, route: Route | None) -> str:
    """The matrices of a parameter in words, its blocks by their names where a preset has them."""
    reading = Reading.of(group)
    preset = route.preset if route is not None else None
    labels = preset.labels if preset is not None and reading.split_sizes in _splits(preset) else ()
    told = describe(blocks_in(group, name, param), reading, labels)
    if (period := group["block_period"]) > 1:
        told += f"; in {period - 1} of {period} steps {count_blocks(blocks_between(group, name, param))}"
    return told


def _splits(preset: Preset) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(reading.split_sizes for reading in (preset.auto, preset.heads) if reading is not None)


def _unread(groups: Sequence[Group], routes: Mapping[str, Route]) -> list[str]:
    """What is known of parameters that Muon takes for something else, by the way to change that."""
    found: dict[tuple[str, str], list[str]] = {}
    for index, group in enumerate(groups):
        for name in group_names(group, f"group {index}") if group["use_muon"] else ():
            preset = routes[name].preset if name in routes else None
            if preset is None:
                continue
            reading, auto = Reading.of(group), preset.auto
            word = "auto" if auto.split_sizes else "heads"
            if preset.labels and reading.split_sizes is None and reading.num_heads is None:
                found.setdefault((f"hold {' | '.join(preset.labels)} and count as one matrix", word), []).append(name)
            elif auto.transposed and not reading.transposed:
                what = "are stored (in, out) and have the learning rate of (out, in)"
                found.setdefault((what, "auto"), []).append(name)
    return [
        f"{len(names)} parameters such as {names[0]} {what}: matrices={word!r} reads them as the module does."
        for (what, word), names in found.items()
    ]


def _look_fused(groups: Sequence[Group], routes: Mapping[str, Route]) -> list[str]:
    names = [
        name
        for index, group in enumerate(groups)
        for name in group_names(group, f"group {index}")
        if group["use_muon"] and name in routes and routes[name].looks_fused
    ]
    return [looks_fused(names)] if names else []


def nothing_on_muon(report: RoutingReport) -> str:
    """The message for an optimizer that would be AdamW alone."""
    return (
        "no parameter goes to Muon:\n"
        f"{report}\n"
        "Pass muon_names or groups with use_muon=True. If the matrices of the model are 1-D here, they were "
        "flattened (FSDP1, ZeRO): shard with torch.distributed.fsdp.fully_shard instead. For AdamW alone "
        "use torch.optim.AdamW."
    )


def _variant_notes(groups: Sequence[Group]) -> list[str]:
    cautious = [str(index) for index, group in enumerate(groups) if group["cautious_wd"]]
    found = [
        f"group {index} is updated by {group['variant']}, with a second moment of each "
        f"{'row' if by_rows(group['variant']) else 'element'} (muon_beta2={group['muon_beta2']})."
        for index, group in enumerate(groups)
        if group["use_muon"] and has_moments(group["variant"])
    ]
    if cautious:
        found.append(f"of group {', '.join(cautious)} only weights that a step makes smaller decay (cautious_wd).")
    return found


def _engine_notes(groups: Sequence[Group], options: Options, pipelines: Sequence[Pipeline]) -> list[str]:
    """Which engine orthogonalizes how many matrices, in which precision."""
    # the lowest rank's table counts, and is known once there is a plan
    tables = {pipeline.device.type: pipeline.table for pipeline in pipelines}
    counts: Counter[tuple[str, str, torch.dtype]] = Counter()
    for index, group in enumerate(groups):
        if group["use_muon"]:
            request = options.request(group)
            for name, param in zip(group_names(group, f"group {index}"), group["params"], strict=True):
                table = tables.get(param.device.type, options.table(param.device))
                for block in blocks_in(group, name, param):
                    spec = block.matrices
                    recipe = choose(spec.rows, spec.cols, param.device, request, table)
                    counts[param.device.type, recipe.engine, recipe.dtype] += spec.count
    return [
        f"{count} matrices on {device}, rounded to {options.ns_dtype}: engine {engine}, in {held}."
        for (device, engine, held), count in counts.items()
    ]


def _plan_note(pipeline: Pipeline) -> str:
    """Who does the work, and how much memory that takes for the while."""
    plan = pipeline.plan
    where = "on one rank"
    if len(plan.ranks) > 1:
        where = f"over {len(plan.ranks)} ranks, load of the busiest {plan.imbalance:.3f} of the mean"
    teams: Counter[int] = Counter()
    for bucket in plan.buckets:
        if bucket.parts > 1:
            teams[bucket.parts] += sum(assignment.count for assignment in bucket.assignments if not assignment.part)
    shared = "".join(f", {count} matrices on teams of {size}" for size, count in sorted(teams.items()))
    buffers = pipeline.buffer_bytes() / 2**20
    return (
        f"{len(plan.buckets)} buckets {where}{shared}; buffers of rank {pipeline.rank} take at most {buffers:.1f} MiB."
    )

"""Whatever the shapes, meshes, placements, readings and missing gradients: two steps have the bits of one process.

There the matrices that a parameter is read as are parameters of their own.

A failure prints the drawn case; ``Pool(4).run(compare, Case(...))`` runs it again.
"""

import itertools
import math
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Pool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import Reference, Twins, assert_same_bits, distribute, give_gradients, mesh_of, sharded_optimizer
from torch.distributed.tensor import DTensor, Replicate, Shard

from distmuon.plan.reading import WHOLE, Reading

WORLD_SIZE = 4
STEPS = 2
# Name of a mesh: its axes; on the last two each pair of ranks has a parameter of its own
MESHES = {"world": 1, "grid": 2, "neighbours": 1, "strided": 1, "none": 0}
# Names tell layouts.kind_of how a parameter is optimized
RANKS = {"matrix": (2, 3), "conv": (2, 3, 4), "adamw": (0, 1)}


@dataclass(frozen=True)
class Parameter:
    """One drawn parameter.

    Attributes:
        name: Starts with how it is optimized.
        shape: The global shape.
        dtype: Name of the dtype.
        mesh: A key of ``MESHES``.
        placements: For each axis of the mesh the dimension that is sharded; None: replicated.
        missing: For each step, at which coordinates of the sharded axes the gradient is None, or ``"all"``.
        reading: The matrices that it holds.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    mesh: str
    placements: tuple[int | None, ...]
    missing: tuple[Any, ...]
    reading: Reading = WHOLE


@dataclass(frozen=True)
class Case:
    """A model and the settings that must not change its bits."""

    parameters: tuple[Parameter, ...]
    bucket_bytes: int
    replicas: str


def reading_of(shape, flatten, seed):
    """A reading of a shape: blocks anywhere, or as many that take turns, and heads.

    Not drawn by hypothesis, whose few examples are mostly simple ones.
    """
    random = Random(repr((shape, flatten, seed)))
    transposed = not flatten and random.random() < 0.5
    split_axis = "rows" if flatten else random.choice(["rows", "cols"])
    stored = (shape[0], 0) if flatten else shape[-2:]
    length = stored[(split_axis == "rows") == transposed]
    how = random.choice(["stored", "blocks", "heads", "heads of blocks", "turns"])
    several = random.choice([count for count in range(2, length) if length % count == 0] or [length])
    sizes, heads = None, None
    if how == "turns":
        sizes = (length // several,) * several
    elif how == "heads":
        heads = several
    elif how != "stored":
        # heads of all blocks have one length, or else hardly any block had several
        unit = several if how == "heads of blocks" else 1
        places = range(1, length // unit)
        ends = [0, *sorted(random.sample(places, min(len(places), random.randint(0, 2)))), length // unit]
        sizes = tuple(unit * (b - a) for a, b in itertools.pairwise(ends))
        if how == "heads of blocks":
            each = tuple(random.choice([None, size // unit, size // unit]) for size in sizes)
            heads = random.choice([each, math.gcd(*sizes)])
    return Reading(flatten, transposed, sizes, heads, split_axis, how == "turns")


@st.composite
def parameters(draw, number):
    kind = draw(st.sampled_from(["matrix", "matrix", "conv", "adamw"]))
    # Beyond a vector register too, whose last elements go through other code
    side = st.one_of(st.integers(1, 7), st.sampled_from([6, 12, 16, 35]))
    shape = tuple(draw(side) for _ in range(draw(st.sampled_from(RANKS[kind]))))
    mesh = draw(st.sampled_from(list(MESHES)))
    dims = [None, *range(len(shape))]
    placements = tuple(draw(st.sampled_from(dims)) for _ in range(MESHES[mesh]))
    places = st.tuples(*(st.integers(0, 3 if mesh == "world" else 1) for dim in placements if dim is not None))
    missing = st.one_of(st.just(frozenset()), st.just("all"), st.frozensets(places, max_size=2))
    # AdamW's eps is 0 in float16, so gradients of zero make it NaN
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float64", *(["float16"] if kind != "adamw" else [])]))
    name = f"{kind}{number}"
    reading = WHOLE if kind == "adamw" else reading_of(shape, kind == "conv", draw(st.integers(0, 999)))
    return Parameter(name, shape, dtype, mesh, placements, tuple(draw(missing) for _ in range(STEPS)), reading)


@st.composite
def cases(draw):
    matrix = draw(parameters(0).filter(lambda p: p.name.startswith("matrix")))
    others = [draw(parameters(number)) for number in range(1, draw(st.integers(1, 6)))]
    bucket_bytes = draw(st.sampled_from([1, 64, 1 << 20]))
    return Case((matrix, *others), bucket_bytes, draw(st.sampled_from(["share", "repeat"])))


def build(case):
    twins = Twins({}, {}, options={"replicas": case.replicas})
    grid, rank = mesh_of(2, 2), dist.get_rank()
    known = {
        "world": (mesh_of(4), 0),
        "grid": (grid, 0),
        "neighbours": (grid["inner"], rank // 2),
        "strided": (grid["outer"], rank % 2),
        "none": (None, rank),
    }
    for p in case.parameters:
        mesh, salt = known[p.mesh]
        placements = [Replicate() if dim is None else Shard(dim) for dim in p.placements]
        dtype = getattr(torch, p.dtype)
        distribute(twins, p.name, p.shape, mesh, placements if p.mesh != "none" else None, dtype, salt)
        if not p.name.startswith("adamw"):
            twins.readings[p.name] = p.reading
    return twins


def compare(case):
    """Empty, or what went wrong: an error that all ranks raise alike leaves them fit for the next case."""
    try:
        steps_agree(case)
    except (AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def steps_agree(case):
    twins = build(case)
    optimizer = sharded_optimizer(twins, bucket_bytes=case.bucket_bytes)
    reference = Reference(twins)
    drawn = {p.name: p for p in case.parameters}
    for step in range(STEPS):

        def missing(name, step=step):
            where, param = drawn[name].missing[step], twins.ours[name]
            if where == "all":
                return "all"
            if not isinstance(param, DTensor):
                return () in where
            places = zip(param.device_mesh.get_coordinate(), drawn[name].placements, strict=True)
            return tuple(place for place, dim in places if dim is not None) in where

        give_gradients(twins, step, missing)
        # A gradient that is None everywhere is not one of zeros: no step, no state
        for name, param in twins.ours.items():
            if everywhere_missing(param):
                twins.whole[name].grad = None
        optimizer.step()
        reference.step()
        assert_same_bits(twins, optimizer, reference, f"step {step} of {case}")


def everywhere_missing(param):
    count = torch.tensor(int(param.grad is not None))
    if isinstance(param, DTensor):
        for axis in range(param.device_mesh.ndim):
            dist.all_reduce(count, group=param.device_mesh.get_group(axis))
    return count.item() == 0


@pytest.fixture(scope="module")
def pool():
    with Pool(WORLD_SIZE) as pool:
        yield pool


@pytest.mark.slow
@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(case=cases())
def test_random_layouts(pool, case):
    assert pool.run(compare, case) == [""] * WORLD_SIZE

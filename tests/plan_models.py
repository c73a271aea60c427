"""Made-up models for tests of plans: shapes, layouts, costs, teams and nodes."""

import itertools

from hypothesis import strategies as st

from distmuon.plan.boxes import Box
from distmuon.plan.matrices import matrix_spec
from distmuon.plan.parameters import Holding, ParameterSpec, TeamCost


def chunks(size, parts):
    """Offsets and lengths as torch.chunk and FSDP2 cut a dimension; trailing parts may be empty."""
    step = -(-size // parts)
    starts = [min(size, step * part) for part in range(parts)]
    return [(start, min(size, start + step) - start) for start in starts]


def holdings(shape, ranks, *, axis, replicas):
    """Who stores what when ``ranks`` shard a dimension inside each of ``replicas`` copies."""
    per_replica = len(ranks) // replicas
    found = []
    for number, rank in enumerate(ranks):
        replica, place = divmod(number, per_replica)
        offset, length = chunks(shape[axis], per_replica)[place]
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[axis], sizes[axis] = offset, length
        found.append(Holding(rank, Box(tuple(offsets), tuple(sizes)), (replica,)))
    return tuple(found)


def elements(box):
    """Every element of a box, as places in the parameter."""
    return list(itertools.product(*(range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))))


def spec(name, shape, held, **keywords):
    matrices = matrix_spec(name, shape, flatten=False)
    short, long = sorted((matrices.rows, matrices.cols))
    cost = short * short * (2 * long + short)
    return ParameterSpec(matrices, tuple(shape), held, **{"cost": cost, **keywords})


def in_nodes(ranks, size):
    """Nodes of ``size`` ranks; the last may have fewer."""
    return tuple(tuple(ranks[start : start + size]) for start in range(0, len(ranks), size))


@st.composite
def team_costs(draw, cost, extent):
    """Teams that are faster than one owner, though they work more in all."""
    found = []
    for size in draw(st.sets(st.integers(2, 6))):
        least = -(-cost // size)
        if size <= extent and least < cost:
            found.append(TeamCost(size, draw(st.integers(least, cost - 1))))
    return tuple(sorted(found, key=lambda team: team.size))


@st.composite
def models(draw):
    """Parameters of several layouts on up to 6 ranks in nodes, some of which teams may own, and a bucket size."""
    replicas = draw(st.integers(1, 3))
    ranks = tuple(range(replicas * draw(st.integers(1, 3 if replicas < 3 else 2))))
    small = st.integers(1, 9)
    specs = []
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(small, min_size=2, max_size=3))
        copies = draw(st.sampled_from(sorted({1, replicas, len(ranks)})))
        axis = draw(st.integers(0, len(shape) - 1))
        held = holdings(shape, ranks, axis=axis, replicas=copies)
        cost = draw(st.integers(1, 50))
        teams = draw(team_costs(cost, max(shape[-2:])))
        kinds = {"group": draw(st.integers(0, 1)), "kind": draw(st.sampled_from("ab"))}
        specs.append(spec(f"w{number}", shape, held, cost=cost, teams=teams, **kinds))
    return ranks, specs, draw(st.integers(1, 200)), in_nodes(ranks, draw(st.integers(1, 6)))

"""Second moments beside matrices: one number for each row or element, and the ways of all."""

import dataclasses
import itertools

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from plan_models import elements, models
from test_matrices_in_parameters import by_hand, readings

from distmuon.flight import LocalParameter, read_words, write_words
from distmuon.local import _with_moments
from distmuon.plan.blocks import Placing, blocks_of
from distmuon.plan.boxes import Box, chunk
from distmuon.plan.companions import Companion, Moments
from distmuon.plan.layouts import Holding
from distmuon.plan.plan import build_plan
from distmuon.plan.reading import Reading
from distmuon.plan.routes import route


def per_row(shape, reading):
    """For each matrix, output x input features, which of the parameter's rows by number: what moments stand for."""
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    return [matrix[:, 0].tolist() for matrix in by_hand(numbers, reading)]


def laid_out(shape, axis, ranks):
    """Boxes of a parameter, and the boxes of its moments, where ``ranks`` cut an axis."""
    for part in range(ranks):
        offset, size = chunk(shape[axis], part, ranks)
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[axis], sizes[axis] = offset, size
        yield Box(tuple(offsets), tuple(sizes))


@given(drawn=readings(), ranks=st.integers(1, 4), axis=st.integers(0, 2), rows=st.booleans(), words=st.integers(1, 2))
@example(drawn=((3, 8), Reading(num_heads=4, split_axis="cols")), ranks=2, axis=0, rows=True, words=2)
@example(drawn=((8, 3), Reading(num_heads=4, split_axis="cols", transposed=True)), ranks=3, axis=1, rows=True, words=1)
def test_ranks_see_the_moments_of_their_blocks(drawn, ranks, axis, rows, words):
    """Each row of each matrix, or each element, has a number of its own, and every rank finds it at the same place."""
    shape, reading = drawn
    axis %= len(shape)
    moments = Moments.of(shape, reading, rows=rows)
    numbers = torch.arange(torch.Size(moments.shape).numel(), dtype=torch.float32).view(moments.shape)
    boxes = list(laid_out(shape, axis, ranks))
    stored = [
        Box(*(tuple(0 if a in moments.reduced else v for a, v in enumerate(box.offsets)), moments.stored(box.sizes)))
        for box in boxes
    ]
    holdings = tuple(Holding(rank, box) for rank, box in enumerate(boxes))
    beside = [Holding(rank, box) for rank, box in enumerate(stored)]
    dtype = torch.float32 if words == 1 else torch.bfloat16
    seen = []
    for _, block, held in Placing().place("w", blocks_of("w", shape, reading), holdings):
        companion = Companion.of(moments, block, beside, words=words)
        count = block.matrices.count
        assert companion.matrix_numel * count == torch.Size(companion.shape).numel()
        logical = block.matrices.logical
        assert companion.matrix_numel == words * logical[0] * (1 if rows else logical[1])
        whole = torch.zeros(companion.shape, dtype=dtype)
        for holding, mine, box in zip(held, companion.holdings, stored, strict=True):
            local = numbers[box.within(Box.whole(moments.shape))]
            nothing = torch.empty(0)
            view = _with_moments(LocalParameter(holding.box, nothing, None, nothing), local, box, companion)
            assert view.moments_box == mine.box
            if mine.box.numel:
                whole[mine.box.within(Box.whole(companion.shape))] = read_words(view, mine.box, dtype)
        seen += whole.view(torch.float32).view(count, -1).tolist()
    assert sorted(number for matrix in seen for number in matrix) == numbers.flatten().tolist()
    if rows:
        assert seen == wanted(numbers, shape, reading, moments)


def wanted(numbers, shape, reading, moments):
    """The moments of the rows of each matrix, in order."""
    if moments.starts:
        (axis,) = moments.reduced
        found = [numbers.select(axis, place) for place in range(len(moments.starts))]
        return [row.tolist() for one in found for row in (one if one.ndim == 2 else [one])]
    # where no matrix shares a row with another, rows are told apart by their first elements
    firsts = per_row(shape, reading)
    order = {number: float(place) for place, number in enumerate(sorted(itertools.chain(*firsts)))}
    assert len(order) == numbers.numel()
    return [[order[number] for number in matrix] for matrix in firsts]


def test_words_keep_every_bit():
    """Also of what is NaN as two halves, and through views that are no block of memory."""
    bits = torch.randint(-(2**31), 2**31, (6, 4), dtype=torch.int64).to(torch.int32).view(torch.float32)
    for view in (bits.clone(), bits.clone().mT, bits.clone()[:, 1:3]):
        nothing = torch.empty(0)
        box = Box((2, 4), (view.size(0), 2 * view.size(1)))
        mine = LocalParameter(Box((0,), (0,)), nothing, None, nothing, view, box)
        for dtype in (torch.bfloat16, torch.float16):
            before = view.clone()
            words = read_words(mine, box, dtype).clone()
            view.zero_()
            for leg in range(3):  # cut through the middle of numbers
                part = box.cut(leg, 3)
                write_words(mine, part, words[part.within(box)])
            assert torch.equal(view.view(torch.int32), before.view(torch.int32))


@given(models(), st.booleans(), st.booleans(), st.integers(1, 2))
def test_moments_go_to_the_owner_and_home_to_everyone_who_stores_them(drawn, all_gather, rows, words):
    ranks, specs, bucket_numel, nodes = drawn
    specs = [beside_moments(spec, rows, words) for spec in specs]
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    for wave in plan.waves:
        routes = {rank: route(plan, wave, rank, active=None, all_gather=all_gather) for rank in ranks}
        arrived = {slot: [] for slot in range(len(wave.assignments))}
        for mine in routes.values():
            for part in [*mine.kept, *mine.gather.receives]:
                arrived[part.slot] += elements(part.box) if part.moments else []
            returned = [part for leg in mine.scatters for part in leg.receives]
            home, stored = (
                sorted((part.slot, *e) for part in parts if part.moments for e in elements(part.box))
                for parts in ([*mine.updated, *returned], mine.held)
            )
            assert home == stored
            assert sum(stack.count * stack.rows * stack.cols + stack.moments for stack in mine.stacks) == (
                mine.owned_numel
            )
        for slot, assignment in enumerate(wave.assignments):
            box = specs[assignment.parameter].companion.box_of(assignment.first, assignment.count)
            assert sorted(arrived[slot]) == sorted(elements(box))
        if not all_gather:
            assert wave.scatters == any(leg.send_numel for r in routes.values() for leg in r.scatters)


def beside_moments(spec, rows, words):
    """The parameter with second moments, and single owners."""
    moments = Moments.of(spec.shape, Reading(), rows=rows)
    held = []
    for holding in spec.holdings:
        offsets = tuple(0 if axis in moments.reduced else at for axis, at in enumerate(holding.box.offsets))
        # copies of rows are told apart as replicas are
        replica = (*holding.replica, holding.rank)
        held.append(Holding(holding.rank, Box(offsets, moments.stored(holding.box.sizes)), replica))
    (block,) = blocks_of(spec.name, spec.shape, Reading())
    companion = Companion.of(moments, block, held, words=words)
    return dataclasses.replace(spec, companion=companion, teams=())

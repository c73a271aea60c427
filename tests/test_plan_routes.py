"""Every element has one way to its owner, or to the rank of a team, and home to everyone who stores it."""

from hypothesis import given
from hypothesis import strategies as st
from plan_models import elements, holdings, models, spec

from distmuon.plan.plan import build_plan
from distmuon.plan.routes import route


@given(models(), st.booleans())
def test_every_element_travels_to_its_owner_and_home_to_everyone_who_stores_it(drawn, all_gather):
    ranks, specs, bucket_numel, nodes = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    for wave in plan.waves:
        routes = {rank: route(plan, wave, rank, active=None, all_gather=all_gather) for rank in ranks}
        arrived = {slot: [] for slot in range(len(wave.assignments))}
        for rank in ranks:
            mine = routes[rank]
            for slot, _ in mine.place:
                assert wave.assignments[slot].owner == rank
            for part in [*mine.kept, *mine.gather.receives]:
                arrived[part.slot] += elements(part.box)
            returned = [part for leg in mine.scatters for part in leg.receives]
            home = sorted(e for part in [*mine.updated, *returned] for e in tagged(part, wave))
            stored = sorted(e for part in mine.held for e in tagged(part, wave))
            assert home == stored
            assert sum(part.box.numel for part in returned) <= wave.returns
        for slot, assignment in enumerate(wave.assignments):
            box = assignment.box(specs[assignment.parameter])
            assert sorted(arrived[slot]) == sorted(elements(box))
        check_leg({rank: routes[rank].gather for rank in ranks}, ranks)
        for leg in range(wave.legs):
            check_leg({rank: routes[rank].scatters[leg] for rank in ranks}, ranks)
        assert wave.gathers == any(r.gather.send_numel for r in routes.values())
        if not all_gather:
            assert wave.scatters == any(leg.send_numel for r in routes.values() for leg in r.scatters)


def returned(routes):
    """What comes back to a rank, in all exchanges."""
    return [part for leg in routes.scatters for part in leg.receives]


def tagged(part, wave):
    return [(wave.assignments[part.slot].parameter, *element) for element in elements(part.box)]


def check_leg(legs, ranks):
    """Sender and receiver mean the same elements by the same place in the message."""
    for i, sender in enumerate(ranks):
        for j, receiver in enumerate(ranks):
            out, into = legs[sender], legs[receiver]
            if out.gathered is not None:
                if sender != receiver:
                    a = [(p.slot, p.box, p.start) for p in out.sends]
                    base = i * into.gathered
                    b = [
                        (p.slot, p.box, p.start - base) for p in into.receives if base <= p.start < base + out.gathered
                    ]
                    assert a == b
                continue
            assert out.send_splits[j] == into.receive_splits[i]
            assert message(out.sends, out.send_splits, j) == message(into.receives, into.receive_splits, i)


def message(parts, splits, index):
    begin = sum(splits[:index])
    inside = [p for p in parts if begin <= p.start < begin + splits[index]]
    return [(p.slot, p.box, p.start - begin) for p in inside]


@given(models(), st.data())
def test_what_takes_no_part_is_not_routed(drawn, data):
    ranks, specs, bucket_numel, nodes = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    active = data.draw(st.lists(st.booleans(), min_size=len(specs), max_size=len(specs)))
    for wave in plan.waves:
        for rank in ranks:
            mine = route(plan, wave, rank, active=active, all_gather=False)
            parts = [*mine.held, *mine.kept, *mine.updated, *mine.gather.sends]
            parts += [part for leg in mine.scatters for part in leg.receives]
            slots = {part.slot for part in parts} | {slot for slot, _ in mine.place}
            assert all(active[wave.assignments[slot].parameter] for slot in slots)


def test_every_owner_sends_in_every_leg():
    """Or some links would idle while others are the bottleneck."""
    ranks = tuple(range(8))
    specs = [spec(f"w{i}", (16, 16), holdings((16, 16), ranks, axis=0, replicas=8)) for i in range(8)]
    plan = build_plan(specs, ranks=ranks, bucket_numel=64)
    (wave,) = plan.waves
    assert wave.legs == 4
    for rank in ranks:
        for leg in route(plan, wave, rank, active=None, all_gather=False).scatters:
            assert leg.send_numel == 7 * 64
            assert leg.receive_numel == 7 * 64

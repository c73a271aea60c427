"""Windows of the pipeline: as far ahead as memory allows, and no further."""

from hypothesis import given
from plan_models import holdings, models, spec

from distmuon.plan.plan import build_plan
from distmuon.plan.schedule import schedule


def fullest(waves, moved):
    """Elements of the rank that owns most of some waves, and what each sends and receives beside them."""
    ranks = {rank for wave in waves for rank in wave.owned_numel()}
    return max((sum(wave.owned_numel()[rank] for wave in waves) for rank in ranks), default=0) + sum(moved)


def arriving(plan):
    """By wave, what a rank sends of it on average."""
    return [sum(wave.owned_numel().values()) / len(plan.ranks) if wave.gathers else 0.0 for wave in plan.waves]


@given(models())
def test_windows_move_forward_around_the_wave_at_hand(drawn):
    ranks, specs, bucket_numel, nodes = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    found, count = schedule(plan), len(plan.waves)
    assert len(found.begun) == len(found.settled) == count
    assert list(found.begun) == sorted(found.begun)
    assert list(found.settled) == sorted(found.settled)
    for number in range(count):
        # one wave ahead is always under way
        assert min(count, number + 2) <= found.begun[number] <= count
        assert 0 <= found.settled[number] <= number


@given(models())
def test_no_rank_gathers_more_than_with_one_wave_ahead(drawn):
    ranks, specs, bucket_numel, nodes = drawn
    plan = build_plan(specs, ranks=ranks, bucket_numel=bucket_numel, nodes=nodes)
    sent = arriving(plan)
    pairs = [fullest(plan.waves[i : i + 2], sent[i : i + 2]) for i in range(len(plan.waves))]
    for i, end in enumerate(schedule(plan).begun):
        assert fullest(plan.waves[i:end], sent[i:end]) <= max(pairs) * (1 + 1e-9)


def test_no_third_wave_is_gathered_where_two_fill_every_rank():
    ranks = (0, 1)
    held = holdings((8, 8), ranks, axis=0, replicas=1)
    specs = [spec(f"w{i}", (8, 8), held) for i in range(8)]
    plan = build_plan(specs, ranks=ranks, bucket_numel=64)
    # every rank owns a matrix of each wave, so two of them are all that fits
    assert len(plan.waves) == 4
    assert schedule(plan).begun == (2, 3, 4, 4)

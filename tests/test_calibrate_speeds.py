"""Links and passes: rates come out of timings again, and files of tables bear them."""

import dataclasses
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distmuon import cli
from distmuon.calibrating import command, measure, passes
from distmuon.calibrating.fit import fit_link, fit_pass, link_errors, link_seconds
from distmuon.calibrating.links import COLLECTIVES, LinkTiming
from distmuon.calibrating.measure import Timing
from distmuon.calibrating.moving import fit_moving
from distmuon.calibrating.passes import PASSES, PassTiming, measure_passes
from distmuon.calibrating.ranks import RanksError, nodes_of
from distmuon.calibrating.report import report_moving
from distmuon.calibrating.session import Findings, combined
from distmuon.calibrating.shapes import LINK_SIZES, PASS_SIDES, Shapes, Sizes
from distmuon.numerics.costs import CostTable, Rates
from distmuon.numerics.tables import builtin_speeds, builtin_table
from distmuon.numerics.update import apply_direction, blend_momentum
from distmuon.speeds import Link, Speeds

ON_CPU = torch.device("cpu")
RATE, LATENCY = st.floats(1e-11, 1e-7), st.floats(1e-6, 1e-3)


def timed(link, ranks, sizes=LINK_SIZES.all, name="local", factor=1.0):
    """What links with these rates would show: the bytes of each collective written out."""
    seconds = {
        "exchange": lambda n: link.latency + link.exchange * n,
        "reduce": lambda n: link.latency + link.reduce_extra + link.reduce * n,
        "gather": lambda n: link.latency + link.gather_extra + link.gather * n,
    }
    return [
        LinkTiming(name, collective, ranks, size, size + 2, factor * seconds[collective](size + 2), 0.0)
        for collective in COLLECTIVES
        for size in sizes
    ]


@given(LATENCY, RATE, RATE, RATE, st.just(0.0) | LATENCY, st.just(0.0) | LATENCY, st.sampled_from([2, 3, 8]))
def test_fit_recovers_the_rates_of_exact_times(latency, exchange, reduce, gather, reduce_extra, gather_extra, ranks):
    link = Link(latency, exchange, reduce, gather, reduce_extra, gather_extra)
    timings = timed(link, ranks)
    found = fit_link(timings)
    # a latency that is a millionth of all that was timed leaves few digits
    for key, value in dataclasses.asdict(link).items():
        assert math.isclose(getattr(found, key), value, rel_tol=1e-6, abs_tol=1e-10 if key not in COLLECTIVES else 0), (
            key
        )
    assert link_errors(timings, found).worst < 1e-9


def test_predictions_are_those_of_the_link():
    """As the cost model asks: of whole tensors, not of what leaves a rank."""
    link = Link(1.0, 2.0, 3.0, 5.0)
    of = {collective: LinkTiming("local", collective, 4, 600, 600, 1.0, 0.0) for collective in COLLECTIVES}
    assert link_seconds(of["exchange"], link) == link.all_to_all(600, 600) == 1201.0
    # 2 * 3/4 of 400, and 3/4 of 800, leave each of 4 ranks
    assert link_seconds(of["reduce"], link) == link.all_reduce(400, 4) == 1801.0
    assert link_seconds(of["gather"], link) == link.all_gather(800, 4) == 3001.0
    later = Link(1.0, 2.0, 3.0, 5.0, reduce_extra=10.0, gather_extra=20.0)
    assert [link_seconds(of[name], later) for name in COLLECTIVES] == [1201.0, 1811.0, 3021.0]
    assert later.all_reduce(400, 1) == later.all_gather(800, 1) == 0.0


@given(st.lists(st.floats(0.3, 3.0), min_size=15, max_size=15))
def test_fit_is_never_negative(factors):
    exact = timed(Link.of(gigabytes=1.0, latency=1e-4), 2, LINK_SIZES.fitted)
    timings = [
        dataclasses.replace(timing, seconds=timing.seconds * factor)
        for timing, factor in zip(exact, factors, strict=True)
    ]
    found = fit_link(timings)
    assert min(dataclasses.asdict(found).values()) >= 0.0
    # no worse than leaving out the latency and taking each collective's own best rate
    squares = sum((link_seconds(t, found) / t.seconds - 1.0) ** 2 for t in timings)
    for collective in COLLECTIVES:
        own = [t for t in timings if t.collective == collective]
        slope = sum(t.nbytes / t.seconds for t in own) / sum((t.nbytes / t.seconds) ** 2 for t in own)
        squares -= sum((slope * t.nbytes / t.seconds - 1.0) ** 2 for t in own)
    assert squares < 1e-9


def test_a_collective_that_was_not_measured_gets_no_rate():
    own = [timing for timing in timed(Link(1e-4, 1e-9, 2e-9, 3e-9), 2) if timing.collective != "gather"]
    found = fit_link(own)
    assert found.gather == 0.0
    assert found.reduce == pytest.approx(2e-9)
    with pytest.raises(ValueError, match="timings is empty"):
        fit_link([])


def test_fit_of_a_pass():
    assert fit_pass([PassTiming("copy", side, 3e-9, 0.0) for side in (4, 8)]) == pytest.approx(3e-9)
    # x with the least (x/1 - 1)^2 + (x/2 - 1)^2
    assert fit_pass([PassTiming("copy", 4, 1.0, 0.0), PassTiming("copy", 8, 2.0, 0.0)]) == pytest.approx(1.2)


def findings(**links):
    timings = [timing for name, (link, ranks) in links.items() for timing in timed(link, ranks, name=name)]
    per_element = {"blend": 2e-9, "copy": 1e-9, "apply": 3e-9}
    own = [PassTiming(name, side, seconds, 0.0) for name, seconds in per_element.items() for side in PASS_SIDES.all]
    return Findings(passes=own, links=timings)


def test_what_was_not_measured_is_the_estimate_and_said_so():
    link = Link(1e-4, 1e-9, 2e-9, 3e-9)
    moving = fit_moving(findings(local=(link, 2)), "cpu-float32", LINK_SIZES, PASS_SIDES)
    assert moving.estimated == ("remote",)
    assert moving.speeds.remote == builtin_speeds("cpu-float32").remote
    assert moving.speeds.local.gather == pytest.approx(3e-9)
    assert (moving.speeds.blend, moving.speeds.copy, moving.speeds.apply) == pytest.approx((2e-9, 1e-9, 3e-9))
    assert set(moving.errors) == {*(f"local {name}" for name in COLLECTIVES), *PASSES}
    text = report_moving(moving)
    assert len(re.findall(r"remote \w+ .* estimate$", text, re.MULTILINE)) == 3
    assert re.search(r"local gather +0\.100 +0\.333 +0% +0%", text)
    assert re.search(r"copy +1 +0% +0%", text)
    assert "local links between 2 ranks; no remote links, for which the built-in estimate stands" in text


def test_both_classes_of_links_have_their_own_rates():
    local, remote = Link(1e-5, 1e-10, 2e-10, 3e-10), Link(1e-3, 1e-8, 2e-8, 3e-8)
    found = findings(local=(local, 8), remote=(remote, 2))
    moving = fit_moving(found, "cuda-sm90", LINK_SIZES, PASS_SIDES)
    assert moving.estimated == ()
    assert moving.ranks == {"local": 8, "remote": 2}
    for key in ("latency", *COLLECTIVES):
        assert getattr(moving.speeds.local, key) == pytest.approx(getattr(local, key))
        assert getattr(moving.speeds.remote, key) == pytest.approx(getattr(remote, key))


def test_errors_are_on_sizes_held_out():
    link = Link(0.0, 1e-9, 1e-9, 1e-9)
    known, unseen = timed(link, 2, LINK_SIZES.fitted), timed(link, 2, LINK_SIZES.held_out, factor=2.0)
    moving = fit_moving(Findings(links=[*known, *unseen]), "cpu-float32", LINK_SIZES, PASS_SIDES)
    for name in COLLECTIVES:
        assert moving.errors[f"local {name}"].worst == pytest.approx(0.5)
        assert moving.errors[f"local {name}"].shapes == len(LINK_SIZES.held_out)
    assert not {*LINK_SIZES.fitted, *PASS_SIDES.fitted} & {*LINK_SIZES.held_out, *PASS_SIDES.held_out}


def test_of_processes_that_measured_together_the_median_counts():
    def of(seconds):
        own = [Timing("gram", 4, 4, 8, 6, False, seconds, 0.1), Timing("gram", 8, 8, 8, 6, False, 10 * seconds, 0.1)]
        return Findings(own, [PassTiming("copy", 4, seconds, 0.0)], [])

    found = combined([of(5.0), of(1.0), of(2.0)])
    assert [timing.seconds for timing in found.engines] == [2.0, 20.0]
    assert [timing.shape for timing in found.engines] == [(4, 4), (8, 8)]
    assert [timing.seconds for timing in found.passes] == [2.0]


def test_passes_are_the_functions_of_a_step(monkeypatch):
    """Each writes what it should from what it should: float32 of shards, bfloat16 of what travels."""
    seen = []

    def blend(grads, buffers, out, **settings):
        seen.append(("blend", grads[0].dtype, buffers[0].dtype, out[0].dtype, len(out), settings))
        blend_momentum(grads, buffers, out, **settings)

    def apply(params, directions, **settings):
        seen.append(("apply", params[0].dtype, directions[0].dtype, len(params), settings))
        apply_direction(params, directions, **settings)

    monkeypatch.setattr(passes, "blend_momentum", blend)
    monkeypatch.setattr(passes, "apply_direction", apply)
    found = measure_passes(ON_CPU, (4, 16), 64, rounds=2)
    assert [(timing.name, timing.side) for timing in found] == [(name, side) for side in (4, 16) for name in PASSES]
    assert all(timing.seconds > 0 and timing.spread >= 0 for timing in found)
    full, half = torch.float32, torch.bfloat16
    assert [call[1:4] for call in seen if call[0] == "blend"] == [(full, full, half)] * 6
    assert [call[1:3] for call in seen if call[0] == "apply"] == [(full, half)] * 6
    # 4 shards of 4 x 4, and one of more than was asked for
    assert {call[-2] for call in seen} == {4, 1}
    assert not any(call[-1]["foreach"] for call in seen)


def test_ranks_of_a_machine_share_its_name():
    assert nodes_of(["a", "b", "a", "b", "b"]) == ((0, 2), (1, 3, 4))


def a_table(speeds):
    return CostTable("cpu-float32", "of a test", (("gram", Rates(1e-3, 0.0, 0.0)),), speeds)


def test_a_table_bears_its_speeds_or_none(tmp_path):
    for speeds in (None, builtin_speeds("cpu-float32"), builtin_speeds("cuda-sm90")):
        a_table(speeds).save(tmp_path / "table.json", links=[1])
        assert CostTable.load(tmp_path / "table.json").speeds == speeds


def test_links_without_what_has_a_default_are_read(tmp_path):
    path = tmp_path / "table.json"
    speeds = builtin_speeds("cuda-sm90")
    a_table(speeds).save(path)
    found = json.loads(path.read_text())
    for link in ("local", "remote"):
        del found["speeds"][link]["reduce_extra"], found["speeds"][link]["gather_extra"]
    path.write_text(json.dumps(found))
    assert CostTable.load(path).speeds == speeds


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda speeds: speeds.pop("remote"), "speeds has no 'remote'"),
        (lambda speeds: speeds.pop("copy"), "speeds has no 'copy'"),
        (lambda speeds: speeds["local"].pop("reduce"), "speeds.local has no 'reduce'"),
        (lambda speeds: speeds["local"].update(exchange=-1e-9), "speeds.local.exchange=-1e-09: seconds are finite"),
        (lambda speeds: speeds["remote"].update(latency=math.nan), "speeds.remote.latency=nan: seconds are finite"),
        (lambda speeds: speeds.update(apply=-1.0), "speeds.apply=-1.0: seconds are finite and not negative"),
        (lambda speeds: speeds.update(blend="fast"), "speeds.blend='fast' is no number of seconds"),
        (lambda speeds: speeds["local"].update(gather=None), "speeds.local.gather=None is no number of seconds"),
        (lambda speeds: speeds["local"].update(reduce_extra=-1.0), "speeds.local.reduce_extra=-1.0: seconds are"),
        (lambda speeds: speeds.update(local=3.0), "speeds.local=3.0 is no link, which has a latency and rates"),
    ],
)
def test_broken_speeds_are_named_in_a_sentence(change, reason, tmp_path):
    path = tmp_path / "table.json"
    a_table(builtin_speeds("cpu-float32")).save(path)
    found = json.loads(path.read_text())
    change(found["speeds"])
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"table\.json' cannot be read") as caught:
        CostTable.load(path)
    told = str(caught.value)
    assert f"({reason}" in told and "\n" not in told
    assert told.endswith("write a table with `distmuon calibrate`.")


def test_speeds_of_the_wrong_kind_are_named(tmp_path):
    path = tmp_path / "table.json"
    a_table(None).save(path, speeds=[1, 2])
    with pytest.raises(ValueError, match=r"cannot be read \(speeds has no 'blend'\): write a table"):
        CostTable.load(path)


def test_estimates_of_gpus_are_those_of_their_links():
    h100 = builtin_speeds("cuda-sm90")
    assert 1e-9 / h100.local.exchange == pytest.approx(400.0)
    assert 1e-9 / h100.remote.exchange == pytest.approx(50.0)
    a100, b200 = builtin_speeds("cuda-sm80"), builtin_speeds("cuda-sm100")
    for key in ("local", "remote"):
        for collective in COLLECTIVES:
            rates = [getattr(getattr(speeds, key), collective) for speeds in (a100, h100, b200)]
            assert rates == sorted(rates, reverse=True)
    for name in PASSES:
        assert getattr(a100, name) > getattr(h100, name) > getattr(b200, name) > 0.0


@pytest.mark.parametrize(
    ("device", "nearest"),
    [
        ("cuda-sm80", "cuda-sm80"),
        ("cuda-sm86", "cuda-sm80"),
        ("cuda-sm89", "cuda-sm80"),
        ("cuda-sm90", "cuda-sm90"),  # H100, H200, GH200
        ("cuda-sm100", "cuda-sm100"),  # B200, GB200
        ("cuda-sm103", "cuda-sm100"),  # B300, GB300
        ("cuda-sm120", "cuda-sm80"),  # of workstations
        ("cuda-sm75", "cuda-sm80"),
        ("xpu", "cuda-sm90"),
        ("cpu-float32", "cpu-float32"),
    ],
)
def test_devices_without_a_table_take_the_nearest(device, nearest):
    assert builtin_table(device).device == nearest
    assert builtin_speeds(device) == builtin_speeds(nearest)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(command, "shapes_for", lambda device: Shapes(((2, 3), (4, 4), (8, 4), (8, 16)), ((3, 3),)))
    monkeypatch.setattr(command, "PASS_SIDES", Sizes((3, 5), (4,)))
    monkeypatch.setattr(command, "PASS_NUMEL", 100)
    monkeypatch.setattr(measure, "_SHORTEST_S", 0.0)


def test_without_links_passes_are_measured_and_links_estimated(tiny, tmp_path, capsys):
    out = tmp_path / "table.json"
    assert cli.main(["calibrate", "--out", str(out), "--engines", "gram", "--no-links"]) == 0
    table = CostTable.load(out)
    built_in = builtin_speeds(table.device)
    assert isinstance(table.speeds, Speeds)
    assert (table.speeds.local, table.speeds.remote) == (built_in.local, built_in.remote)
    assert table.speeds.copy not in (0.0, built_in.copy)
    notes = json.loads(out.read_text())
    assert notes["estimated"] == ["local", "remote"]
    own = [PassTiming(**timing) for timing in notes["passes"] if timing["name"] == "apply"]
    assert table.speeds.apply == fit_pass([timing for timing in own if timing.side != 4])
    assert notes["links"] == []
    assert len(re.findall("estimate$", capsys.readouterr().out, re.MULTILINE)) == 6


def test_links_that_fail_end_it_in_a_sentence(tiny, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RanksError("process 1 of 2: RuntimeError: no route")

    monkeypatch.setattr(command, "run", fail)
    out = tmp_path / "table.json"
    assert cli.main(["calibrate", "--out", str(out)]) == 1
    told = capsys.readouterr().err
    sentence = "links were not measured (process 1 of 2: RuntimeError: no route): give --no-links to do without them."
    assert told == f"error: {sentence}\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ranks", "2"], "--ranks 2 starts processes, and torchrun has started them already: drop it."),
        (["--device", "cpu:0"], "--device cpu:0 is one device, and each process takes its own: give cpu."),
    ],
)
def test_mistakes_under_torchrun(arguments, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    assert cli.main(["calibrate", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert list(tmp_path.iterdir()) == []

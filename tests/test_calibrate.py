"""Rates come out of timings again, their error is told, and the command writes a table that chooses engines."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distmuon
from distmuon import cli
from distmuon.calibrating import command, measure
from distmuon.calibrating.fit import errors, fit
from distmuon.calibrating.measure import Timing
from distmuon.calibrating.report import report
from distmuon.calibrating.session import Findings
from distmuon.calibrating.shapes import ACCELERATOR, CPU, Shapes, Sizes
from distmuon.numerics.costs import CostTable, Rates
from distmuon.numerics.recipe import Request, choose
from distmuon.numerics.tables import builtin_table

ON_CPU, ON_CUDA = torch.device("cpu"), torch.device("cuda", 0)
TINY = Shapes(fitted=((2, 3), (4, 4), (8, 4), (70, 72), (8, 16)), held_out=((3, 3), (5, 9)))
RATE_SIZES = {"fixed": 1e-4, "big": 1e-11, "small": 1e-11, "entries": 1e-9, "square": 1e-8, "batched": 1e-5}


def timed(shape, rates, engine="composed", *, factor=1.0, batched=None):
    """What a machine with these rates would show."""
    batched = min(shape) <= 64 if batched is None else batched
    seconds = factor * rates.seconds(*shape, big=8, small=6, batched=batched)
    return Timing(engine, *shape, 8, 6, batched, seconds, 0.0)


def some_rates(names=tuple(RATE_SIZES)):
    """Each of a usual size, as a term far below the others leaves no trace; or zero, but for the fixed times."""
    sizes = {name: st.floats(0.3 * RATE_SIZES[name], 3 * RATE_SIZES[name]) for name in names}
    drawn = {name: size if name in ("fixed", "batched") else st.just(0.0) | size for name, size in sizes.items()}
    return st.fixed_dictionaries(drawn).map(lambda found: Rates(**found))


@given(some_rates(), st.sampled_from([CPU, ACCELERATOR]))
def test_fit_recovers_the_rates_of_exact_times(rates, shapes):
    found = fit([timed(shape, rates) for shape in shapes.all])
    for name, size in RATE_SIZES.items():
        assert math.isclose(getattr(found, name), getattr(rates, name), rel_tol=1e-5, abs_tol=1e-5 * size), name


@given(some_rates(("fixed", "big", "small", "entries", "square")), st.booleans())
def test_where_all_or_none_are_batched_one_fixed_time_is_found(rates, batched):
    found = fit([timed(shape, rates, batched=batched) for shape in ACCELERATOR.all])
    assert found.batched is None
    assert math.isclose(found.fixed, rates.fixed, rel_tol=1e-5, abs_tol=1e-9)


@given(some_rates(), st.lists(st.floats(0.5, 2.0), min_size=len(CPU.fitted), max_size=len(CPU.fitted)))
def test_fit_is_the_best_that_is_not_negative(rates, noise):
    """At the minimum no rate can be moved, other than below zero, without a larger error (Karush-Kuhn-Tucker)."""
    timings = [timed(s, rates, factor=f) for s, f in zip(CPU.fitted, noise, strict=True)]
    found = fit(timings)
    values = {key: value for key, value in dataclasses.asdict(found).items() if value is not None}
    assert min(values.values()) >= 0.0
    zero = dict.fromkeys(values, 0.0)
    columns = {}
    for name in values:
        unit = Rates(**{**zero, name: 1.0})
        columns[name] = torch.tensor([timed(t.shape, unit).seconds / t.seconds for t in timings], dtype=torch.float64)
    left = sum(values[name] * column for name, column in columns.items()) - 1.0
    for name, column in columns.items():
        # as a cosine, which is without units
        slope = float(left @ column) / float(column.norm() * max(left.norm(), 1e-3) + 1e-300)
        assert slope > -1e-6, name
        assert values[name] == 0.0 or abs(slope) < 1e-6, name


def test_fit_is_the_same_for_any_order_of_timings():
    rates = Rates(**RATE_SIZES)
    timings = [timed(shape, rates, factor=1.0 + 0.1 * (i % 3)) for i, shape in enumerate(CPU.fitted)]
    first, second = fit(timings), fit(timings[::-1])
    for name in RATE_SIZES:
        assert math.isclose(getattr(first, name), getattr(second, name), rel_tol=1e-9), name


def test_fit_of_fewer_timings_than_rates():
    timings = [timed(shape, Rates(1e-4, big=1e-11, small=1e-11)) for shape in ((100, 100), (300, 900))]
    assert errors(timings, fit(timings)).worst < 1e-9
    with pytest.raises(ValueError, match="timings is empty"):
        fit([])


def test_errors_are_relative_to_the_timing():
    rates = Rates(**RATE_SIZES)
    factors = (1.0, 0.8, 2.0)
    timings = [
        timed(shape, rates, factor=f) for shape, f in zip(((70, 70), (90, 200), (300, 80)), factors, strict=True)
    ]
    found = errors(timings, rates)
    # predictions are 1, 1.25 and 0.5 of what was timed
    assert (found.median, found.worst) == pytest.approx((0.25, 0.5))
    assert found.shapes == 3


def test_shapes_that_tell_are_not_those_that_are_fitted():
    for shapes in (CPU, ACCELERATOR):
        assert not set(shapes.fitted) & set(shapes.held_out)
        assert len(shapes.all) == len(shapes.fitted) + len(shapes.held_out)


def test_timings_are_of_what_the_optimizer_runs(monkeypatch):
    seen = []

    def stand_in(x, recipe, *, eps, dtype):
        seen.append((tuple(x.shape), x.dtype, recipe, dtype))

    monkeypatch.setattr(measure, "orthogonalize_", stand_in)
    monkeypatch.setattr(measure, "_SHORTEST_S", 0.0)
    shapes = [(500, 400), (4, 6)]
    found = measure.measure(shapes, ("gram", "composed"), device=ON_CPU, rounds=3)
    assert [(t.engine, t.shape) for t in found] == [("gram", s) for s in shapes] + [("composed", s) for s in shapes]
    # once to warm up, then in rounds
    assert len(seen) == 4 * (1 + 3)
    for shape, dtype, recipe, rounded in seen:
        assert dtype is rounded is torch.bfloat16
        assert recipe == choose(*shape[1:], ON_CPU, Request(torch.bfloat16, recipe.engine))
        # small ones share the threads
        assert shape[0] == (1 if shape[1] == 500 else 8)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when an orthogonalization says so."""

    class Clock:
        now = 0.0
        seconds = staticmethod(lambda shape, call: 1.0)
        calls = 0

        def perf_counter(self):
            return self.now

        def orthogonalize(self, x, recipe, *, eps, dtype):
            self.calls += 1
            self.now += self.seconds(tuple(x.shape), self.calls)

    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "orthogonalize_", clock.orthogonalize)
    return clock


def test_the_fastest_round_counts_and_the_spread_is_told(clock):
    clock.seconds = lambda shape, call: {1: 100.0, 2: 16.0, 3: 8.0, 4: 12.0}[call]
    (found,) = measure.measure([(4, 6)], ("composed",), device=ON_CPU, rounds=3, limit_s=1000.0)
    assert found.seconds == 1.0  # 8 matrices in 8 s
    assert found.spread == pytest.approx(0.5)  # the median took 12


def test_rounds_end_at_the_limit(clock):
    measure.measure([(400, 400), (500, 500)], ("composed",), device=ON_CPU, rounds=9, limit_s=7.0)
    # 2 s to warm up, and rounds of 2 s begin at 2 and 4: one at 6 would end at 8
    assert clock.calls == 6


def test_a_burst_does_not_hit_one_engine_alone(clock):
    """After the first, two calls of every round take ten times as long; they are of one shape, on both engines."""
    clock.seconds = lambda shape, call: 10.0 if call > 6 and call % 6 in (1, 2) else 1.0
    shapes = [(400, 400), (500, 500), (600, 600)]
    found = measure.measure(shapes, ("gram", "composed"), device=ON_CPU, rounds=3, limit_s=1000.0)
    longest = max(timing.seconds for timing in found)
    slow = [(timing.engine, timing.shape) for timing in found if timing.seconds == longest]
    assert slow == [("gram", (400, 400)), ("composed", (400, 400))]


def test_what_would_take_too_long_is_left_out_and_told(clock):
    clock.seconds = lambda shape, call: 1e-9 * shape[0] * shape[1] ** 3
    said = []
    shapes = [(400, 400), (1000, 1000), (2000, 2000)]
    found = measure.measure(shapes, ("composed",), device=ON_CPU, rounds=1, longest_s=3.0, say=said.append)
    assert [timing.shape for timing in found] == shapes[:2]
    assert said == ["left out: composed on 2000 x 2000 would take about 8 s."]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(command, "shapes_for", lambda device: TINY)
    monkeypatch.setattr(command, "PASS_SIDES", Sizes(fitted=(3, 5), held_out=(4,)))
    monkeypatch.setattr(measure, "_SHORTEST_S", 0.0)
    monkeypatch.setattr(command, "PASS_NUMEL", 100)


def test_the_command_writes_a_table_that_is_used(tiny, tmp_path, capsys):
    out, threads = tmp_path / "table.json", torch.get_num_threads()
    assert cli.main(["calibrate", "--out", str(out), "--threads", "1", "--engines", "composed,gram", "--no-links"]) == 0
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    for what in ("5 x 9*", "70 x 72 ", "composed: ", "gram: ", "at worst (2)", f"wrote {out}", "1 thread,"):
        assert what in text
    table = CostTable.load(out)
    assert [name for name, _ in table.engines] == ["composed", "gram"]
    assert table.source.startswith("measured on ") and torch.__version__ in table.source

    notes = json.loads(out.read_text())
    assert len(notes["timings"]) == 2 * len(TINY.all)
    own = [Timing(**timing) for timing in notes["timings"] if timing["engine"] == "gram"]
    assert fit([timing for timing in own if timing.shape in TINY.fitted]) == table.rates("gram")
    unseen = errors([timing for timing in own if timing.shape in TINY.held_out], table.rates("gram"))
    assert notes["errors"]["gram"] == dataclasses.asdict(unseen)

    x = torch.randn(6, 9)
    chosen = choose(6, 9, ON_CPU, Request(torch.float32), table).engine
    assert torch.equal(distmuon.orthogonalize(x, table=table), distmuon.orthogonalize(x, engine=chosen))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--threads", "0"], "--threads is 0, and it counts: give 1 or more."),
        (["--threads", "two"], "invalid int value: 'two' (see distmuon calibrate --help)."),
        (["--engines", "composed,fast"], "--engines names 'fast', which cannot be measured: give some of standard,"),
        (["--engines", "auto"], "--engines names 'auto'"),
        (["--ranks", "0"], "--ranks is 0, and it counts processes: give 1 or more."),
        (["--device", "abacus"], "--device abacus cannot be used ("),
        (["--device", "meta"], "--device meta computes nothing"),
        (["--out", "missing/table.json"], "--out missing/table.json cannot be written (No such file or directory):"),
        (["--out", "."], "--out . cannot be written (Is a directory): name another file."),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: pytest.fail("measured"))
    assert cli.main(["calibrate", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert sentence in told
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_this_machine_lacks(monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: pytest.fail("measured"))
    assert cli.main(["calibrate", "--device", "cuda:99"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --device cuda:99 cannot be used (") and told.count("\n") == 1


def test_an_old_table_survives_a_mistake(tmp_path, monkeypatch):
    out = tmp_path / "table.json"
    out.write_text("old")
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: Findings())
    # nothing could be measured, so there is nothing to write
    assert cli.main(["calibrate", "--out", str(out)]) == 1
    assert out.read_text() == "old"


def test_an_engine_that_is_too_slow_is_left_out(tmp_path, monkeypatch, capsys):
    rates = Rates(**RATE_SIZES)
    slow = [timed(shape, rates, "standard") for shape in CPU.fitted[:3]]
    fast = [timed(shape, rates, "composed") for shape in CPU.all]
    monkeypatch.setattr(command, "run", lambda *args, **kwargs: Findings(engines=slow + fast))
    out = tmp_path / "table.json"
    assert cli.main(["calibrate", "--out", str(out), "--engines", "standard,composed"]) == 0
    assert "left out: standard, too slow here" in capsys.readouterr().out
    assert [name for name, _ in CostTable.load(out).engines] == ["composed"]


def test_the_report_says_what_the_table_loses():
    """The table takes gram everywhere, which is right on one shape and takes 1.5 times as long on the other."""
    rates = {"gram": Rates(1e-6, 0.0, 0.0), "composed": Rates(1e-3, 0.0, 0.0)}
    table = CostTable("cpu-float32", "of a test", tuple(rates.items()))
    times = {("gram", 70): 2.0, ("composed", 70): 3.0, ("gram", 80): 3.0, ("composed", 80): 2.0}
    timings = [Timing(engine, size, size, 8, 6, False, s, 0.5) for (engine, size), s in times.items()]
    found = {engine: errors([t for t in timings if t.engine == engine], rates[engine]) for engine in rates}
    lines = report(timings, [(80, 80)], table, found, ON_CPU).splitlines()
    assert [line.split()[-2:] for line in lines if " x " in line] == [["gram", "gram"], ["composed", "gram"]]
    assert "80 x 80*" in lines[3] and "70 x 70 " in lines[2]
    assert "What auto chooses by this table takes at most 50% longer than the fastest." in lines
    assert lines[-1].startswith("Times differed by 50% between rounds")
    # one engine is enough, and a single round tells nothing
    calm = [dataclasses.replace(t, spread=0.5 if t.engine == "gram" else 0.01) for t in timings]
    assert "Times differed by 50% between rounds" in report(calm, [(80, 80)], table, found, ON_CPU)
    once = [dataclasses.replace(t, spread=0.0) for t in timings]
    assert "Time was up after one round" in report(once, [(80, 80)], table, found, ON_CPU)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["calibrate", "--help"])
    assert stop.value.code == 0
    assert "usage: distmuon calibrate" in capsys.readouterr().out


def test_a_matrix_in_a_batch_has_its_own_fixed_time(tmp_path):
    rates = Rates(fixed=1.0, big=0.0, small=0.0, batched=0.25)
    assert rates.seconds(3, 4, big=8, small=6) == 1.0
    assert rates.seconds(3, 4, big=8, small=6, batched=True) == 0.25
    assert Rates(fixed=1.0, big=0.0, small=0.0).seconds(3, 4, big=8, small=6, batched=True) == 1.0
    table = CostTable("cpu-float32", "of a test", (("composed", rates),))
    recipes = [choose(size, size, ON_CPU, Request(torch.float32, "composed")) for size in (64, 65)]
    assert [recipe.seconds(3, 4, table) for recipe in recipes] == [0.25, 1.0]
    table.save(tmp_path / "table.json", links=[1, 2])
    assert CostTable.load(tmp_path / "table.json") == table


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"lost\.json' cannot be read .*No such file.*distmuon calibrate"):
        CostTable.load(tmp_path / "lost.json")


def engine_of(shape, device, table):
    return choose(*shape, device, Request(torch.bfloat16), builtin_table(table)).engine


@pytest.mark.parametrize("shape", [(128, 512), (256, 256), (512, 2048), (768, 768), (3072, 768), (2048, 2048)])
def test_without_half_precision_units_factorizations_are_chosen(shape):
    assert engine_of(shape, ON_CPU, "cpu-float32") == "rational"


def test_with_amx_products_are_chosen(native_bf16):
    assert engine_of((768, 768), ON_CPU, "cpu-amx") == "composed"
    # the Gram form begins anew at each stage in bfloat16, so that it is the composed iteration
    assert engine_of((768, 3072), ON_CPU, "cpu-amx") == "composed"


@pytest.mark.parametrize("table", ["cuda-sm80", "cuda-sm90", "cuda-sm100"])
def test_on_a_gpu_wide_matrices_take_their_gram_matrix(table, monkeypatch):
    monkeypatch.setattr("distmuon.numerics.hardware.has_native_bf16", lambda device_type: True)
    monkeypatch.setattr("distmuon.numerics.recipe.available", lambda device: True)
    for size in (1024, 4096):
        assert engine_of((size, size), ON_CUDA, table) == "composed"
        assert engine_of((size, 4 * size), ON_CUDA, table) == "gram"
        assert engine_of((4 * size, size), ON_CUDA, table) == "gram"


def test_estimates_and_measurements_say_which_they_are():
    assert builtin_table("cpu-float32").source.startswith("measured on ")
    for device in ("cpu-bf16", "cpu-amx", "cuda-sm80", "cuda-sm90", "cuda-sm100"):
        assert builtin_table(device).source.startswith("estimate ")
        assert builtin_table(device).device == device

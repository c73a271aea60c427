"""What a matrix gets is a matter of its shape, its device and the cost table."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distmuon
from distmuon.numerics import recipe as recipes
from distmuon.numerics.costs import CostTable, Rates
from distmuon.numerics.products import Kernels, Strips, Whole, strips
from distmuon.numerics.rationals import RATIONALS
from distmuon.numerics.recipe import Request, choose
from distmuon.numerics.tables import builtin_table

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SLOW, FAST = Rates(fixed=1.0, big=1e-9, small=1e-9), Rates(fixed=0.0, big=1e-12, small=1e-12)
# composed is better for small matrices here, gram for large ones
CROSSING = (("composed", Rates(1e-6, big=2e-11, small=0.0)), ("gram", Rates(1e-3, big=1e-11, small=0.0)))


def table(*engines):
    return CostTable("cpu-float32", "of a test", engines)


def on_cpu(rows, cols, dtype=torch.bfloat16, table=None, **keywords):
    return choose(rows, cols, CPU, Request(dtype, **keywords), table)


@pytest.fixture
def cuda(monkeypatch):
    """Pretend that there is an H100 with Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr("distmuon.numerics.recipe.available", lambda device: True)
    recipes.forget()
    yield
    recipes.forget()


@pytest.mark.parametrize("fastest", ["composed", "gram", "rational"])
def test_auto_takes_the_fastest_of_the_table(fastest):
    engines = tuple((name, FAST if name == fastest else SLOW) for name in ("composed", "gram", "rational"))
    assert on_cpu(300, 500, table=table(*engines)).engine == fastest


def test_auto_weighs_shapes():
    assert on_cpu(16, 16, table=table(*CROSSING)).engine == "composed"
    assert on_cpu(2048, 8192, table=table(*CROSSING)).engine == "gram"


def test_a_table_is_used_by_the_optimizer(tmp_path):
    path = tmp_path / "table.json"
    table(("gram", FAST)).save(path)
    group = {"params": [torch.nn.Parameter(torch.randn(9, 5))], "use_muon": True}
    assert "engine gram" in str(distmuon.Muon([group], cost_table=path).report())
    assert "engine gram" in str(distmuon.Muon([group], cost_table=CostTable.load(path)).report())


@given(
    st.builds(
        Rates,
        *(st.floats(0, 1e3, allow_nan=False) for _ in range(5)),
    )
)
def test_a_table_survives_its_file(tmp_path_factory, rates):
    path = tmp_path_factory.mktemp("tables") / "table.json"
    before = table(("composed", rates), ("gram", FAST))
    before.save(path)
    assert CostTable.load(path) == before


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "Expecting property name"),
        ("[]", ""),
        (json.dumps({"device": "cpu", "source": "x"}), "engines"),
        (json.dumps({"device": "cpu", "source": "x", "engines": {}}), "no engine"),
        (json.dumps({"device": "cpu", "source": "x", "engines": {"gram": {"fixed": 1}}}), "big"),
        (
            json.dumps({"device": "cpu", "source": "x", "engines": {"gram": {"fixed": -1, "big": 1, "small": 1}}}),
            "fixed",
        ),
    ],
)
def test_files_that_are_no_table(tmp_path, text, what):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"table\.json' cannot be read .*{what}.*distmuon calibrate"):
        CostTable.load(path)


def test_products_are_counted():
    """FLOPs of the documentation: five quintic steps 10 + 5, nested14 8 + 6, in the Gram form 4 + 12."""
    found = {name: on_cpu(512, 512, engine=name) for name in ("standard", "composed", "gram", "rational")}
    assert (found["standard"].big, found["standard"].small) == (10, 5)
    assert (found["composed"].big, found["composed"].small) == (8, 6)
    assert (found["gram"].big, found["gram"].small) == (4, 12)
    assert (found["rational"].big, found["rational"].small) == (2, 2)


def test_seconds_follow_the_formula():
    rates = Rates(fixed=1.0, big=2.0, small=3.0, entries=5.0, square=7.0)
    assert rates.seconds(20, 3, big=2, small=4) == 1 + 2 * 2 * 9 * 20 + 3 * 4 * 27 + 5 * 60 + 7 * 9


def test_what_each_engine_runs_by_itself():
    assert on_cpu(100, 100, engine="standard").formula == recipes.resolve_stages("quintic")
    assert on_cpu(100, 100, engine="composed").formula == recipes.resolve_stages("nested14")
    assert on_cpu(100, 100, engine="gram").formula == recipes.resolve_stages("nested14")
    assert on_cpu(100, 100, engine="rational").formula == RATIONALS["rational2"]


def test_the_external_engine_gets_its_stages_and_restarts(monkeypatch):
    asked = []

    def stand_in(x, coefficients, *, restarts):
        asked.append((x.dtype, coefficients, restarts))
        return x

    monkeypatch.setattr("distmuon.numerics.orthogonalize.gram_newton_schulz", stand_in)
    distmuon.orthogonalize(torch.randn(3, 4, 5), engine="gram_newton_schulz")
    assert asked == [(torch.float16, recipes.resolve_stages("polar_express", 5), (2,))]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(compile="reduce_overhead"), "no mode of torch.compile; known: default"),
        (dict(engine="composed", restarts=(0, 2)), "acts with engine='gram' alone"),
        (dict(safety=0.5), "at least 1"),
        (dict(coefficients="rational2", safety=1.01), "for polynomials"),
    ],
)
def test_arguments_act_or_raise(keywords, message):
    with pytest.raises(ValueError, match=message):
        Request(torch.bfloat16, **keywords)


def test_rational_is_not_chosen_where_the_host_would_be_waited_for(cuda):
    rates = table(("rational", FAST), ("composed", SLOW))
    assert choose(300, 300, CUDA, Request(torch.bfloat16), rates).engine == "composed"


def test_float32_goes_by_float32_rates(native_bf16):
    assert on_cpu(2048, 2048, dtype=torch.float32) == on_cpu(
        2048, 2048, dtype=torch.float32, table=builtin_table("cpu-float32")
    )


def test_a_table_of_another_device_is_refused():
    group = {"params": [torch.nn.Parameter(torch.randn(9, 5))], "use_muon": True}
    group["params"][0].grad = torch.randn(9, 5)
    optimizer = distmuon.Muon([group], cost_table=CostTable("cuda-sm90", "of a test", (("gram", FAST),)))
    with pytest.raises(ValueError, match="make one with `distmuon calibrate --device cpu`"):
        optimizer.step()
    with pytest.raises(TypeError, match="cost_table is a dict"):
        distmuon.Muon([group], cost_table={})


def test_the_external_engine_must_be_installed():
    with pytest.raises(ImportError, match="gram-newton-schulz"):
        distmuon.Muon(
            [{"params": [torch.nn.Parameter(torch.randn(9, 5))], "use_muon": True}], ns_engine="gram_newton_schulz"
        )


def test_what_is_asked_for_is_run():
    assert on_cpu(100, 100, coefficients="rational3").formula == RATIONALS["rational3"]
    asked = on_cpu(100, 100, coefficients=[3.0, -3.0, 1.0], steps=2)
    assert (asked.engine, asked.formula) == ("composed", ((3.0, -3.0, 1.0),) * 2)
    assert on_cpu(100, 100, steps=6).formula == recipes.resolve_stages("quintic", 6)


@pytest.mark.parametrize("rows", [1, 63, 127, 128, 255, 256, 300, 511, 512, 777, 4096])
def test_strips_cover_the_rows(rows):
    cut = strips(rows)
    assert cut[0][0] == 0 and cut[-1][1] == rows
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(cut))
    assert len(cut) == 1 or min(end - begin for begin, end in cut) >= 128


def test_precision_on_a_cpu_without_bfloat16_units(monkeypatch):
    monkeypatch.setattr("distmuon.numerics.hardware.has_native_bf16", lambda device_type: False)
    recipes.forget()
    assert on_cpu(300, 300, engine="composed").dtype is torch.float32
    assert on_cpu(300, 300, engine="standard").dtype is torch.bfloat16
    assert on_cpu(300, 300, dtype=torch.float64, engine="rational").dtype is torch.float64
    recipes.forget()


def test_precision_on_a_cpu_with_bfloat16_units(native_bf16):
    assert on_cpu(300, 300, engine="composed").dtype is torch.bfloat16
    assert on_cpu(300, 300, engine="rational").dtype is torch.float32
    # Gram matrices in bfloat16 are too noisy to go on with
    assert on_cpu(300, 900, engine="gram").restarts == (0, 1, 2, 3)
    # batches of bfloat16 products differ from single ones
    assert not on_cpu(8, 8, engine="composed").batched
    assert on_cpu(768, 768, engine="composed").one_thread and not on_cpu(768, 3072, engine="composed").one_thread


def test_products_by_size_on_a_cpu():
    assert on_cpu(300, 300, dtype=torch.float32, engine="composed").products == Strips()
    assert on_cpu(30, 30, dtype=torch.float32, engine="composed").products == Whole()
    assert on_cpu(300, 300, engine="standard").products == Whole()


def test_gpu(cuda):
    square, wide, small = (
        choose(rows, cols, CUDA, Request(torch.bfloat16)) for rows, cols in ((4096, 4096), (4096, 16384), (768, 768))
    )
    assert (square.engine, square.dtype) == ("composed", torch.bfloat16)
    assert (wide.engine, wide.dtype, wide.restarts) == ("gram", torch.float16, (0, 2))
    assert square.products == wide.products == Kernels()
    assert small.products == Whole()
    assert all(found.batched and not found.one_thread for found in (square, wide, small))
    compiled = choose(4096, 4096, CUDA, Request(torch.bfloat16, compile=True))
    assert compiled.products == Whole()


@pytest.mark.parametrize(
    ("engine", "coefficients", "steps", "message"),
    [
        ("fast", "auto", None, "ns_engine='fast' is unknown"),
        ("gram", "rational2", None, "leave ns_engine on 'auto'"),
        ("rational", "quintic", None, "does not run polynomials"),
        ("rational", "auto", 5, "ns_steps=5 has nothing to act on"),
        ("auto", "rational3", 2, "ns_steps=2 has nothing to act on"),
        ("auto", "magic", None, "ns_coefficients='magic' is unknown"),
        ("auto", "auto", 0, "ns_steps=0"),
        ("gram", "nested14", 5, "pass ns_steps=4"),
        ("gram_newton_schulz", "nested14", None, "not of three numbers"),
        ("auto", 3.0, None, "'auto', a name, stages, or a Rational"),
    ],
)
def test_what_does_not_go_together(engine, coefficients, steps, message):
    with pytest.raises(ValueError, match=message):
        Request(torch.bfloat16, engine, coefficients, steps)


@pytest.mark.parametrize(
    "device", ["cpu-float32", "cpu-bf16", "cpu-amx", "cuda-sm80", "cuda-sm90", "cuda-sm120", "xpu"]
)
def test_every_device_has_a_table(device):
    found = builtin_table(device)
    assert found.source and {name for name, _ in found.engines} >= {"composed", "gram"}

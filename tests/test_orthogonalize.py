import importlib
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

from distmuon import orthogonalize
from distmuon.numerics.coefficients import TABLES
from distmuon.numerics.polar import polar_factor
from distmuon.numerics.rationals import RATIONALS, Rational
from distmuon.numerics.workers import spread

orthogonalizing = importlib.import_module("distmuon.numerics.orthogonalize")

QUINTIC = (3.4445, -4.7750, 2.0315)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
POLYNOMIAL_ENGINES = ("standard", "composed", "gram")
ENGINES = ("auto", *POLYNOMIAL_ENGINES, "rational")
# square, tall, wide, one row, one column, fewer rows than any batch, odd
SHAPES = ((24, 24), (40, 16), (16, 40), (1, 9), (9, 1), (2, 33), (17, 13))


def torch_newton_schulz(x, steps=5, eps=1e-7):
    return _zeropower_via_newtonschulz(x.clone(), QUINTIC, steps, eps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_standard_engine_has_the_bits_of_torch(shape, dtype):
    x = torch.randn(3, *shape).to(dtype)
    y = orthogonalize(x, engine="standard", eps=1e-7, dtype=torch.bfloat16)
    for mine, source in zip(y, x, strict=True):
        assert torch.equal(mine, torch_newton_schulz(source))


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 24),
    cols=st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from((None, *DTYPES)),
    way=st.sampled_from([("auto", "auto"), ("rational", "rational3"), *product(POLYNOMIAL_ENGINES, TABLES)]),
)
def test_any_shape_and_dtype(lead, rows, cols, dtype, out, way):
    engine, table = way
    x = torch.randn(*lead, rows, cols).to(dtype)
    before = x.clone()
    y = orthogonalize(x, engine=engine, coefficients=table, dtype=out)
    assert torch.equal(x, before)
    assert y.shape == x.shape
    assert y.dtype == (out or dtype)
    assert y.data_ptr() != x.data_ptr()
    assert y.is_contiguous()
    assert torch.isfinite(y).all()
    assert torch.linalg.matrix_norm(y.double(), 2).max() <= 1.45


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(7, 5), (40, 60), (64, 64), (65, 65), (90, 20), (20, 90), (300, 260)])
def test_a_matrix_comes_out_the_same_in_any_company(shape, engine):
    x = torch.randn(4, *shape)
    # a neighbour of another scale, one that is zero and one that is no number
    x[1] *= 1e25
    x[2] = 0.0
    x[3, 0, 0] = float("nan")
    together = orthogonalize(x, engine=engine)
    for matrix, alone in zip(together, x, strict=True):
        assert torch.equal(matrix, orthogonalize(alone, engine=engine)) or torch.isnan(alone).any()


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (90, 70), (300, 260), (130, 520)])
@pytest.mark.parametrize("table", ["quintic", "polar_express", "nested14", "nested13"])
def test_engines_agree_in_float64(shape, table):
    x = torch.randn(2, *shape, dtype=torch.float64)
    expected = orthogonalize(x, engine="standard", coefficients=table)
    for engine in ("composed", "gram"):
        actual = orthogonalize(x, engine=engine, coefficients=table)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (90, 70), (300, 260)])
@pytest.mark.parametrize("name", RATIONALS)
def test_rational_is_its_formula(shape, name):
    """The function of the singular values, from their decomposition in float64."""
    x = torch.randn(*shape, dtype=torch.float64)
    x /= x.norm()
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    f = RATIONALS[name]
    image = f.constant + f.linear * sigma**2 + sum(weight / (sigma**2 + shift) for weight, shift in f.poles)
    torch.testing.assert_close(orthogonalize(x, coefficients=name), (u * (sigma * image)) @ vh, rtol=1e-8, atol=1e-9)


def test_a_factorization_that_fails_is_made_up_for():
    # nothing is left of so small a shift in float32: R + shift is singular for a matrix of low rank
    x = torch.randn(3, 30, 2) @ torch.randn(3, 2, 40)
    bad = Rational(constant=1.0, linear=0.0, poles=((1e-12, 1e-12),))
    y = orthogonalize(x, coefficients=bad)
    expected = orthogonalize(x, engine="composed", coefficients="nested14", dtype=torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    alone = orthogonalize(torch.randn(90, 2) @ torch.randn(2, 80), coefficients=bad)
    assert torch.linalg.matrix_norm(alone, 2) < 1.2


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(constant=1.0, linear=0.0, poles=()), "at least one pole"),
        (dict(constant=1.0, linear=float("nan"), poles=((1.0, 1.0),)), "finite"),
        (dict(constant=1.0, linear=0.0, poles=((1.0, 0.0),)), "positive"),
    ],
)
def test_rationals_that_cannot_be(numbers, message):
    with pytest.raises(ValueError, match=message):
        Rational(**numbers)


def test_several_threads_change_no_bit(monkeypatch):
    """Small matrices have one thread each however many there are; products of torch do not depend on it either."""
    x = torch.randn(5, 90, 120)
    one = orthogonalize(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(orthogonalize(x), one)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 96, 96)])
def test_modes_of_the_caller_change_nothing(threads, shape):
    x, before = torch.randn(shape), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        expected = orthogonalize(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(orthogonalize(x), expected)
        with torch.inference_mode():
            assert torch.equal(orthogonalize(x), expected)
    finally:
        torch.set_num_threads(before)
    assert not orthogonalize(x.requires_grad_()).requires_grad


def test_an_error_in_a_thread_is_raised():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            spread(lambda item: 1 / item, [1, 0, 1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_chunks_do_not_change_the_result(monkeypatch):
    x = torch.randn(7, 12, 20)
    whole = orthogonalize(x)
    monkeypatch.setattr("distmuon.numerics.orthogonalize.cpu_cache_bytes", lambda: 1)
    assert torch.equal(orthogonalize(x), whole)


@pytest.mark.parametrize("shape", [*SHAPES, (70, 90)])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero(shape, engine, dtype):
    zero = torch.zeros(shape, dtype=dtype)
    assert torch.equal(orthogonalize(zero, engine=engine), zero)


@pytest.mark.parametrize("shape", [*SHAPES, (70, 90)])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_become_nan(shape, engine, bad):
    x = torch.randn(2, *shape)
    x[0].view(-1)[0] = bad
    y = orthogonalize(x, engine=engine)
    assert torch.isnan(y[0]).any()
    assert torch.isfinite(y[1]).all()


@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-18, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["auto", "composed", "gram", "rational"])
@pytest.mark.parametrize("shape", [(20, 30), (80, 70)])
def test_scale_does_not_matter(shape, scale, engine, dtype):
    x = torch.randn(shape).to(dtype)
    # a power of two, so that scaling itself rounds nothing
    scale = 2.0 ** round(torch.log2(torch.tensor(scale, dtype=torch.float64)).item())
    y = orthogonalize(x * scale, engine=engine)
    # singular values at the foot of the spectrum are steep in what rounding does to the norm
    rtol = 1e-2 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(y, orthogonalize(x, engine=engine), rtol=rtol, atol=1e-5)


def test_eps_shrinks_what_is_smaller():
    x = torch.randn(8, 8)
    x /= x.norm()
    assert orthogonalize(x * 1e-13, eps=1e-7).norm() < 0.5 * orthogonalize(x).norm()
    torch.testing.assert_close(orthogonalize(x * 1e-6, eps=1e-7), orthogonalize(x), rtol=1e-4, atol=1e-5)


def test_rank_one_is_its_direction():
    u, v = torch.randn(30, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    y = orthogonalize(torch.outer(u, v), coefficients="polar_express", steps=10)
    torch.testing.assert_close(y, torch.outer(u / u.norm(), v / v.norm()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_polar_express_converges_to_the_polar_factor(shape):
    x = torch.randn(shape, dtype=torch.float64)
    y = orthogonalize(x, coefficients="polar_express", steps=14)
    torch.testing.assert_close(y, polar_factor(x), rtol=1e-6, atol=1e-6)


def test_transposing_commutes():
    x = torch.randn(3, 10, 22, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(x.mT), orthogonalize(x).mT, rtol=1e-10, atol=1e-12)


def test_result_is_row_major():
    assert orthogonalize(torch.randn(2, 40, 16)).is_contiguous()


def test_empty_batch():
    assert orthogonalize(torch.empty(0, 4, 5)).shape == (0, 4, 5)


@pytest.mark.parametrize("engine", ["composed", "gram"])
def test_compiled_matches(engine):
    x = torch.randn(3, 16, 24)
    compiled = orthogonalize(x, compile=True, engine=engine)
    torch.testing.assert_close(compiled, orthogonalize(x, engine=engine), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(5), ValueError, "got shape"),
        (torch.ones(3, 3, dtype=torch.int32), TypeError, "int32"),
        (torch.ones(3, 3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.eye(3).to_sparse(), TypeError, "sparse"),
    ],
)
def test_what_is_no_matrix_is_an_error(x, error, message):
    with pytest.raises(error, match=message):
        orthogonalize(x)


def test_where_compiling_fails_batches_run_as_they_are(monkeypatch, caplog):
    def broken(function, **keywords):
        assert keywords["mode"] == "reduce-overhead"

        def fail(*args):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    x = torch.randn(3, 16, 24)
    expected = orthogonalize(x, engine="composed")
    orthogonalizing._compiled.cache_clear()
    try:
        for _ in range(2):
            assert torch.equal(orthogonalize(x, compile="reduce-overhead", engine="composed"), expected)
    finally:
        orthogonalizing._compiled.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "compile='reduce-overhead' is switched off, as torch.compile failed: no compiler here"
    ]


@pytest.mark.parametrize("engine", ["standard", "rational"])
def test_compile_needs_products_in_batches(engine):
    with pytest.raises(ValueError, match=f"engine='{engine}'"):
        orthogonalize(torch.randn(3, 3), compile=True, engine=engine)


@pytest.mark.parametrize("restarts", [(), (1,), (0, 0), (0, 2, 1), (0, 5)])
def test_restarts_that_cannot_be(restarts):
    with pytest.raises(ValueError, match="give ascending numbers of stages from 0 to 4"):
        orthogonalize(torch.randn(3, 3), engine="gram", coefficients="quintic", restarts=restarts)


@pytest.mark.parametrize("restarts", [(0,), (0, 1), (0, 2, 4), range(5)])
def test_restarts_do_not_change_the_polynomial(restarts):
    x = torch.randn(12, 20, dtype=torch.float64)
    expected = orthogonalize(x, engine="standard", coefficients="polar_express", steps=5)
    actual = orthogonalize(x, engine="gram", coefficients="polar_express", steps=5, restarts=restarts)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_safety_acts():
    x = torch.randn(8, 8, dtype=torch.float64)
    smaller = orthogonalize(x, coefficients=[(1.5, -0.5)], steps=1, safety=2.0)
    torch.testing.assert_close(smaller, orthogonalize(x, coefficients=[(0.75, -0.0625)], steps=1))

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

from distmuon import orthogonalize
from distmuon.numerics.coefficients import TABLES
from distmuon.numerics.polar import polar_factor

QUINTIC = (3.4445, -4.7750, 2.0315)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# square, tall, wide, one row, one column, fewer rows than any batch, odd
SHAPES = ((24, 24), (40, 16), (16, 40), (1, 9), (9, 1), (2, 33), (17, 13))


def torch_newton_schulz(x, steps=5, eps=1e-7):
    return _zeropower_via_newtonschulz(x.clone(), QUINTIC, steps, eps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unbatched_path_has_the_bits_of_torch(shape, dtype):
    x = torch.randn(3, *shape).to(dtype)
    y = orthogonalize(x, steps=5, eps=1e-7, dtype=torch.bfloat16, batched=False)
    for mine, source in zip(y, x, strict=True):
        assert torch.equal(mine, torch_newton_schulz(source))


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 24),
    cols=st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from((None, *DTYPES)),
    table=st.sampled_from(sorted(TABLES)),
    batched=st.booleans(),
)
def test_any_shape_and_dtype(lead, rows, cols, dtype, out, table, batched):
    x = torch.randn(*lead, rows, cols).to(dtype)
    before = x.clone()
    y = orthogonalize(x, coefficients=table, dtype=out, batched=batched)
    assert torch.equal(x, before)
    assert y.shape == x.shape
    assert y.dtype == (out or dtype)
    assert y.data_ptr() != x.data_ptr()
    assert torch.isfinite(y).all()
    assert torch.linalg.matrix_norm(y.double(), 2).max() <= 1.45


@given(
    count=st.integers(2, 5),
    rows=st.integers(2, 20),
    cols=st.integers(2, 20),
    table=st.sampled_from(["quintic", "polar_express", "nested14"]),
)
def test_a_batch_is_its_matrices(count, rows, cols, table):
    x = torch.randn(count, rows, cols)
    together = orthogonalize(x, coefficients=table)
    alone = torch.stack([orthogonalize(matrix, coefficients=table) for matrix in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_batched_and_unbatched_agree_in_float64(shape):
    x = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(x), orthogonalize(x, batched=False), rtol=1e-10, atol=1e-12)


def test_chunks_do_not_change_the_result(monkeypatch):
    x = torch.randn(7, 12, 20)
    whole = orthogonalize(x)
    monkeypatch.setattr("distmuon.numerics.orthogonalize.cpu_cache_bytes", lambda: 1)
    torch.testing.assert_close(orthogonalize(x), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero(shape, batched, dtype):
    zero = torch.zeros(shape, dtype=dtype)
    assert torch.equal(orthogonalize(zero, batched=batched), zero)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_become_nan(shape, bad):
    x = torch.randn(2, *shape)
    x[0].view(-1)[0] = bad
    y = orthogonalize(x)
    assert torch.isnan(y[0]).any()
    assert torch.isfinite(y[1]).all()


@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-18, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_does_not_matter(scale, dtype):
    x = torch.randn(20, 30).to(dtype)
    # a power of two, so that scaling itself rounds nothing
    scale = 2.0 ** round(torch.log2(torch.tensor(scale, dtype=torch.float64)).item())
    torch.testing.assert_close(orthogonalize(x * scale), orthogonalize(x), rtol=1e-5, atol=1e-6)


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


def test_compiled_matches():
    x = torch.randn(3, 16, 24)
    torch.testing.assert_close(orthogonalize(x, compile=True), orthogonalize(x), rtol=1e-4, atol=1e-5)


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


def test_compile_needs_batches():
    with pytest.raises(ValueError, match="batched"):
        orthogonalize(torch.randn(3, 3), compile=True, batched=False)

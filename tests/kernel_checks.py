"""What the Triton kernels compute, against float64; run by ``test_kernels.py`` in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from distmuon.numerics.kernels import available, symmetric
from distmuon.numerics.kernels.tiles import Tile

# significant bits: the relative error of one rounding is at most 2^-bits
BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
DTYPES = tuple(BITS)
# batch and matrix: one element, one row, whole tiles and pieces, a tile and a bit in both directions, tall
SHAPES = ((1, 1), (1, 1, 40), (3, 64, 64), (70, 100), (3, 66, 7))
# one element in a batch, a tile and a bit
SYMMETRIC = ((3, 1, 1), (70, 70))
# many small tiles: panels narrower than the matrix, the last one cut, and wider
TILES = tuple(Tile(16, 16, warps=4, stages=2, panel=panel) for panel in (2, 8))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def random_symmetric(*shape, dtype=torch.float32):
    x = random(*shape) / shape[-1] ** 0.5
    return (x + x.mT).to(dtype)


def assert_product(result, a, b, beta=0.0, c=None, alpha=1.0):
    """Each element: one rounding of the result, and float32 rounding of the terms of its sum."""
    a, b = a.double(), b.double()
    expected = alpha * a @ b.mT
    magnitude = abs(alpha) * a.abs() @ b.abs().mT
    if c is not None:
        expected = expected + beta * c.double()
        magnitude = magnitude + abs(beta) * c.double().abs()
    half = torch.ones_like(expected, dtype=torch.bool).triu()
    expected = torch.where(half, expected, expected.mT)
    terms = a.shape[-1] + 4
    # the last term: half of float16's smallest number
    bound = 2.0 ** -BITS[result.dtype] * expected.abs() + terms * 2.0**-24 * (magnitude + magnitude.mT) + 2.0**-25
    assert ((result.double() - expected).abs() <= bound).all()
    assert torch.equal(result, result.mT)


def test_the_interpreter_counts_as_a_device():
    assert symmetric._INTERPRETED, "set TRITON_INTERPRET=1: these checks run in the interpreter"
    assert available("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram(shape, dtype):
    x = random(*shape, dtype=dtype)
    r = symmetric.gram(x)
    assert r.dtype == dtype
    assert r.shape == (*shape[:-1], shape[-2])
    assert r.is_contiguous()
    assert_product(r, x, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SYMMETRIC)
def test_quadratic(shape, dtype):
    a = random_symmetric(*shape, dtype=dtype)
    assert_product(symmetric.quadratic(a, -4.775, 2.0315), a, a, -4.775, a, 2.0315)
    assert_product(symmetric.quadratic(a, 0, 2.0), a, a, alpha=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SYMMETRIC)
def test_symmetric_product(shape, dtype):
    a = random_symmetric(*shape, dtype=dtype)
    b = (0.5 * a.double() @ a.double() - a.double()).to(dtype)
    c = random_symmetric(*shape, dtype=dtype)
    assert_product(symmetric.symmetric_product(a, b, 3.0, c, -0.5), a, b, 3.0, c, -0.5)
    product = symmetric.symmetric_product(a, b)
    assert_product(product, a, b)
    # both halves of A B, which differ by the rounding of B alone
    difference = product.double() - a.double() @ b.double()
    assert difference.norm() <= 2.0 ** (2 - BITS[dtype]) * a.double().norm() * b.double().norm()


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles_of_other_sizes(tile):
    x = random(75, 20)
    assert_product(symmetric.gram(x, tile=tile), x, x)


@triton.jit
def _place_tiles(indices, rows, columns, tiles_a_side, panel: tl.constexpr, block: tl.constexpr):
    place = tl.arange(0, block)
    row, column = symmetric._upper_tile(tl.load(indices + place), tiles_a_side, panel)
    tl.store(rows + place, row)
    tl.store(columns + place, column)


def place_tiles(indices, side, panel):
    """Row and column of each tile of ``indices``."""
    count = indices.numel()
    block = triton.next_power_of_2(count)
    padded = torch.nn.functional.pad(indices, (0, block - count)).int()
    rows, columns = torch.empty(2, block, dtype=torch.int32)
    _place_tiles[(1,)](padded, rows, columns, side, panel=panel, block=block)
    return rows[:count].long(), columns[:count].long()


# one tile, less than a panel, whole panels, a part of one
@pytest.mark.parametrize(("side", "panel"), [(1, 8), (5, 8), (16, 8), (37, 8), (20, 1), (20, 3)])
def test_the_grid_is_the_upper_triangle(side, panel):
    rows, columns = place_tiles(torch.arange(side * (side + 1) // 2), side, panel)
    assert (rows >= 0).all()
    assert (rows <= columns).all()
    assert (columns < side).all()
    assert torch.unique(rows * side + columns).numel() == rows.numel()
    # a panel is finished before the next one starts
    assert ((columns // panel).diff() >= 0).all()


def test_the_grid_where_the_root_of_float32_is_inexact():
    side = 16384
    # with panels of one column, column j starts with tile j (j + 1) / 2
    column = torch.arange(1, side)
    for index, row, want in (
        (column * (column + 1) // 2, torch.zeros_like(column), column),
        (column * (column + 1) // 2 - 1, column - 1, column - 1),
    ):
        rows, columns = place_tiles(index, side, 1)
        assert torch.equal(columns, want)
        assert torch.equal(rows, row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input(dtype):
    big = random(4, 140, 20, dtype=dtype)
    for x in (
        big.mT,  # tall: the short side's Gram matrix
        big[::2, ::2, ::3],
        big[1].mT,
        big[:1, :66].expand(2, 66, 20),
        big.permute(2, 1, 0)[:2, :66],
    ):
        assert_product(symmetric.gram(x), x, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_to_out_alone(dtype):
    x = random(3, 66, 20, dtype=dtype)
    before = x.clone()
    workspace = torch.full((2, 5, 80, 150), 7.0, dtype=dtype)
    out = workspace[1, 1:4, 2:68, 3:135:2].mT
    result = symmetric.gram(x, out)
    assert result is out
    assert_product(out, x, x)
    assert torch.equal(x, before)
    out.fill_(7.0)
    assert (workspace == 7.0).all()


def test_out_of_another_dtype():
    x = random(70, 40, dtype=torch.bfloat16)
    assert_product(symmetric.gram(x, torch.empty(70, 70)), x, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_be_the_addend(dtype):
    a = random_symmetric(70, 70, dtype=dtype)
    c = random_symmetric(70, 70, dtype=dtype)
    before = c.clone()
    result = symmetric.symmetric_product(a, a, 2.0, c, 1.5, out=c)
    assert result is c
    assert_product(c, a, a, 2.0, before, 1.5)


def test_nothing_is_read_with_beta_zero():
    a = random_symmetric(40, 40)
    assert_product(symmetric.symmetric_product(a, a, 0.0, torch.full_like(a, torch.nan)), a, a)
    # as with torch.empty, `out` may hold anything before
    assert_product(symmetric.gram(a, torch.full_like(a, torch.nan)), a, a)


def test_a_matrix_has_the_same_bits_alone_and_in_a_batch():
    x = random(2, 70, 100, dtype=torch.bfloat16)
    together = symmetric.gram(x)
    for one, matrix in zip(together, x, strict=True):
        assert torch.equal(one, symmetric.gram(matrix))


def test_bfloat16_is_rounded_to_nearest_even():
    # halfway to the odd and to the even neighbour, a little above halfway, and the largest below infinity
    for value in (1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-16, -(1 + 2.0**-8 + 2.0**-16), 2.0**127):
        x = torch.tensor([[value]])
        result = symmetric.symmetric_product(x, torch.eye(1), out=torch.empty(1, 1, dtype=torch.bfloat16))
        assert torch.equal(result, x.bfloat16())


def test_not_a_number_and_infinity_stay():
    for value in (torch.nan, torch.inf):
        x = random(70, 40, dtype=torch.bfloat16)
        x[3, 5] = value
        assert not torch.isfinite(symmetric.gram(x)[3, 69])
        assert torch.isfinite(symmetric.gram(x)[4, 69])


def test_empty():
    assert symmetric.gram(torch.empty(0, 5)).shape == (0, 0)
    assert symmetric.gram(torch.empty(0, 4, 5)).shape == (0, 4, 4)
    assert torch.equal(symmetric.gram(torch.empty(2, 4, 0)), torch.zeros(2, 4, 4))


def test_errors():
    x, a = torch.ones(4, 6), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"x has shape \(4,\)"):
        symmetric.gram(torch.ones(4))
    with pytest.raises(ValueError, match=r"x has shape \(1, 1, 4, 6\)"):
        symmetric.gram(torch.ones(1, 1, 4, 6))
    with pytest.raises(ValueError, match=r"x is of torch\.float64"):
        symmetric.gram(x.double())
    with pytest.raises(ValueError, match=r"out has shape \(4, 6\)"):
        symmetric.gram(x, torch.empty(4, 6))
    with pytest.raises(ValueError, match=r"out is of torch\.float64"):
        symmetric.gram(x, torch.empty(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="out shares memory"):
        symmetric.quadratic(a, 1.0, 1.0, out=a)
    with pytest.raises(ValueError, match="out shares memory"):
        symmetric.symmetric_product(a, a.clone().mul_(2), out=a.view(4, 4))
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"a has shape \(4, 6\): pass a symmetric matrix"):
            symmetric.quadratic(x, beta, 1.0)
    with pytest.raises(ValueError, match=r"a has shape \(4, 6\): pass a symmetric matrix"):
        symmetric.symmetric_product(x, x)
    with pytest.raises(ValueError, match=r"b has shape \(5, 5\)"):
        symmetric.symmetric_product(a, torch.ones(5, 5))
    with pytest.raises(ValueError, match=r"b is of torch\.float16"):
        symmetric.symmetric_product(a, a.half())
    with pytest.raises(ValueError, match=r"beta is 2\.0 and c is missing"):
        symmetric.symmetric_product(a, a, 2.0)
    with pytest.raises(ValueError, match=r"c has shape \(2, 2\)"):
        symmetric.symmetric_product(a, a, 2.0, torch.ones(2, 2))
    with pytest.raises(ValueError, match="strides"):
        symmetric.gram(torch.empty(2**24 + 2, dtype=torch.float16).as_strided((2, 2), (2**24, 1)))

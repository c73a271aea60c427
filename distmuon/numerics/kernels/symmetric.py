"""Products of matrices whose result is symmetric: half of the work of a full product.

A symmetric result R is known from its upper half. Only tiles that touch the diagonal or lie above it are
computed, each element on or above the diagonal is stored at its place and at its mirror image, and so R
equals its transpose in every bit. Three products of Newton-Schulz have this form:

    gram               R = X X^T
    quadratic          beta A + alpha A A        with A symmetric
    symmetric_product  beta C + alpha A B        with A, B and C symmetric, A B = B A

Since B = B^T, all are beta C + alpha A B^T, so one kernel serves them: it reads rows of A and rows of B, which
is also the order in which they lie in memory.

Sums are taken in float32 with products of full precision (float32 factors are not rounded to TF32), and each
element is rounded once, after the addend. Gradients do not flow through these functions.

The launchers are plain functions: ``torch.compile`` traces through them and sees the kernel, without what each
call of an operator of ``torch.library`` costs.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from distmuon.numerics.kernels.tiles import Tile, choose, upper_tiles

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "distmuon.numerics.kernels.symmetric needs the package triton, which is not installed: install it "
        "(`pip install triton`, Linux only; PyTorch for CUDA brings it), or ask kernels.available(device) first."
    ) from error

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_STRIDE = 1 << 24


@triton.jit
def _triangle_column(index):  # type: ignore[no-untyped-def]
    """The j with j (j + 1) / 2 <= index < (j + 1) (j + 2) / 2."""
    column = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    # the root is rounded, on a GPU approximate, so it can miss by one either way
    column = tl.where(column * (column + 1) // 2 > index, column - 1, column)
    return tl.where((column + 1) * (column + 2) // 2 <= index, column + 1, column)


@triton.jit
def _upper_tile(index, tiles_a_side, panel: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of tile ``index``: panels from left to right, each row by row, its triangle last.

    The first j columns hold j (j + 1) / 2 tiles, so that many come before the panel that starts with column j.
    """
    first = _triangle_column(index) // panel * panel
    width = tl.minimum(panel, tiles_a_side - first)
    index -= first * (first + 1) // 2
    rest = tl.maximum(index - first * width, 0)
    column = _triangle_column(rest)
    in_rectangle = index < first * width
    row = tl.where(in_rectangle, index // width, first + rest - column * (column + 1) // 2)
    return row, first + tl.where(in_rectangle, index % width, column)


@triton.jit
def _nearest_bfloat16(x):  # type: ignore[no-untyped-def]
    """The finite float32 ``x`` moved so that cutting its lower 16 bits off rounds it to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)


# the counts of tiles would compile the kernel again at each multiple of 16 and gain nothing
@triton.jit(do_not_specialize=["tiles", "tiles_a_side"])
def _upper_product(  # type: ignore[no-untyped-def]
    a,
    b,
    c,
    out,
    alpha,
    beta,
    size,
    inner,
    tiles,
    tiles_a_side,
    a_batch,
    a_row,
    a_inner,
    b_batch,
    b_row,
    b_inner,
    c_batch,
    c_row,
    c_column,
    out_batch,
    out_row,
    out_column,
    side: tl.constexpr,
    piece: tl.constexpr,
    panel: tl.constexpr,
    has_addend: tl.constexpr,
    whole_pieces: tl.constexpr,
    interpreted: tl.constexpr,
):
    """One tile of ``beta C + alpha A B^T`` and its mirror image: A and B (b, size, inner), C and out (b, size, size).

    ``whole_pieces``: ``inner`` is a multiple of ``piece``. ``interpreted``: see `_INTERPRETED`.
    """
    program = tl.program_id(0)
    # the origins are 64 bits wide, as a batch or a matrix can have more than 2^31 elements; within a tile 32 do
    batch = (program // tiles).to(tl.int64)
    tile_row, tile_column = _upper_tile(program % tiles, tiles_a_side, panel)
    top = (tile_row * side).to(tl.int64)
    left = (tile_column * side).to(tl.int64)
    row = tl.arange(0, side)[:, None]
    column = tl.arange(0, side)[None, :]
    # how many rows and columns of the tile the matrix still has
    rows = size - top
    columns = size - left

    step = tl.arange(0, piece)
    step_of_a = step[None, :]
    step_of_b = step[:, None]
    a += batch * a_batch + top * a_row
    b += batch * b_batch + left * b_row
    a_piece = a + (row * a_row + step_of_a * a_inner)
    b_piece = b + (column * b_row + step_of_b * b_inner)
    total = tl.zeros((side, side), dtype=tl.float32)
    for start in range(0, inner, piece):
        if whole_pieces:
            of_a = tl.load(a_piece, mask=row < rows, other=0.0)
            of_b = tl.load(b_piece, mask=column < columns, other=0.0)
        else:
            of_a = tl.load(a_piece, mask=(row < rows) & (step_of_a < inner - start), other=0.0)
            of_b = tl.load(b_piece, mask=(column < columns) & (step_of_b < inner - start), other=0.0)
        if interpreted:
            of_a = of_a.to(tl.float32)
            of_b = of_b.to(tl.float32)
        total = tl.dot(of_a, of_b, total, input_precision="ieee")
        a_piece += piece * a_inner
        b_piece += piece * b_inner

    total *= alpha
    if has_addend:
        c += batch * c_batch + top * c_row + left * c_column
        addend = tl.load(c + (row * c_row + column * c_column), mask=(row < rows) & (column < columns), other=0.0)
        total += beta * addend.to(tl.float32)
    if interpreted and out.dtype.element_ty == tl.bfloat16:
        total = _nearest_bfloat16(total)
    result = total.to(out.dtype.element_ty)
    mirrored = tl.trans(result)
    out += batch * out_batch
    if tile_row == tile_column:
        # what lies below the diagonal is the mirror image of what lies above it, to the bit
        result = tl.where(row <= column, result, mirrored)
    within = row * out_row + column * out_column
    tl.store(out + (top * out_row + left * out_column) + within, result, mask=(row < rows) & (column < columns))
    if tile_row != tile_column:
        tl.store(out + (left * out_row + top * out_column) + within, mirrored, mask=(row < columns) & (column < rows))


# Triton's interpreter multiplies bfloat16 wrongly and cuts where a GPU rounds, so there the kernel multiplies in
# float32, which is the same product, and rounds by itself
_INTERPRETED = not isinstance(_upper_product, triton.JITFunction)


def gram(x: Tensor, out: Tensor | None = None, *, tile: Tile | None = None) -> Tensor:
    """The Gram matrix ``X X^T`` of the rows of each matrix.

    Args:
        x: (m, n) or (b, m, n), float32, float16 or bfloat16, of any strides. Pass ``x.mT`` for ``X^T X``; the
            cost is that of m rows, so give the wide one of the two.
        out: where to write, (m, m) or (b, m, m), of any strides and of any of the three dtypes; memory of its own.
        tile: how to cut the result; by default `choose(m, x.dtype)`.

    Returns:
        ``out``, or a new contiguous tensor of ``x``'s dtype; exactly symmetric.

    Raises:
        ValueError: ``x`` has other than 2 or 3 dimensions or another dtype, is not on a device that Triton
            serves, or strides by 2^24 elements or more within a matrix; or ``out`` does not fit.
    """
    return _launch("x", x, x, None, out, alpha=1.0, beta=0.0, square=False, tile=tile)


def quadratic(a: Tensor, beta: float, alpha: float, out: Tensor | None = None, *, tile: Tile | None = None) -> Tensor:
    """``beta A + alpha A A`` for symmetric A.

    Args:
        a: (m, m) or (b, m, m), symmetric (not checked: only rows are read), in a dtype of `gram`.
        beta: factor of A.
        alpha: factor of A A.
        out: as in `gram`; must not be ``a``.
        tile: as in `gram`.

    Returns:
        ``out``, or a new contiguous tensor of ``a``'s dtype; exactly symmetric.

    Raises:
        ValueError: as `gram`, or ``a`` is not square.
    """
    return _launch("a", a, a, a if beta != 0 else None, out, alpha=alpha, beta=beta, square=True, tile=tile)


def symmetric_product(
    a: Tensor,
    b: Tensor,
    beta: float = 0.0,
    c: Tensor | None = None,
    alpha: float = 1.0,
    out: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """``beta C + alpha A B`` for symmetric A, B and C where A and B commute, so that the result is symmetric.

    Polynomials of one symmetric matrix commute. Only the upper half of the result is computed, from rows of A
    and rows of B, and mirrored: this keeps it exactly symmetric where rounding would let A B and B A drift
    apart. With factors that do not commute, the result is the upper half of A B^T and its mirror image.

    Args:
        a: (m, m) or (b, m, m), symmetric, in a dtype of `gram`.
        b: symmetric, of ``a``'s shape and dtype.
        beta: factor of C; with 0, C is not read.
        c: symmetric, of ``a``'s shape, in any dtype of `gram`; needed where ``beta`` is not 0.
        alpha: factor of A B.
        out: as in `gram`; must not be ``a`` or ``b``, and may be ``c``.
        tile: as in `gram`.

    Returns:
        ``out``, or a new contiguous tensor of ``a``'s dtype; exactly symmetric.

    Raises:
        ValueError: as `gram`, or the shapes, dtypes or devices of ``a``, ``b`` and ``c`` do not fit each other.
    """
    if beta != 0 and c is None:
        raise ValueError(f"symmetric_product: beta is {beta} and c is missing: pass c, or leave beta at 0.")
    return _launch("a", a, b, c if beta != 0 else None, out, alpha=alpha, beta=beta, square=True, tile=tile)


def _launch(
    name: str,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    out: Tensor | None,
    *,
    alpha: float,
    beta: float,
    square: bool,
    tile: Tile | None,
) -> Tensor:
    """Checks, allocates and starts the kernel; ``name`` is what the caller calls ``a``."""
    _check_factor(name, a)
    lead, (size, inner) = a.shape[:-2], a.shape[-2:]
    if square and size != inner:
        raise ValueError(f"{name} has shape {tuple(a.shape)}: pass a symmetric matrix.")
    _check_like("b", b, name, a, a.shape, (a.dtype,))
    shape = torch.Size((*lead, size, size))
    if c is not None:
        _check_like("c", c, name, a, shape, _DTYPES)
    if out is None:
        out = a.new_empty(shape)
    else:
        _check_like("out", out, name, a, shape, _DTYPES)
        _check_apart(out, a, b)
    if out.numel() == 0:
        return out

    cut = tile or choose(size, a.dtype)
    tiles = upper_tiles(size, cut)
    batch = lead[0] if lead else 1
    # the kernel reads no addend where there is none, and a pointer must be given all the same
    addend = a if c is None else c
    for tensor in (a, b, addend, out):
        _check_strides(tensor)
    with _on_device(a):
        _upper_product[(batch * tiles,)](
            a,
            b,
            addend,
            out,
            float(alpha),
            float(beta),
            size,
            inner,
            tiles,
            -(-size // cut.side),
            *_strides(a),
            *_strides(b),
            *_strides(addend),
            *_strides(out),
            side=cut.side,
            piece=cut.piece,
            panel=cut.panel,
            has_addend=c is not None,
            whole_pieces=inner % cut.piece == 0,
            interpreted=_INTERPRETED,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return out


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of (b, m, n); a single matrix is a batch of one."""
    return (x.stride(0) if x.ndim == 3 else 0, x.stride(-2), x.stride(-1))


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the GPU of ``x`` current, as Triton launches there; a compiler does so itself."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _check_factor(name: str, x: Tensor) -> None:
    if x.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: pass one matrix (m, n) or a batch (b, m, n).")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} is of {x.dtype}: convert it to bfloat16, float16 or float32.")
    if not (x.is_cuda or _INTERPRETED):
        raise ValueError(
            f"{name} is on {x.device.type}, and Triton kernels run on a GPU: move it there, or set "
            "TRITON_INTERPRET=1 before Triton is imported to check results without one."
        )


def _check_like(
    name: str, x: Tensor, other: str, like: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype, ...]
) -> None:
    if x.shape != shape or x.device != like.device:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} on {x.device}: to go with {other}, pass one of "
            f"shape {tuple(shape)} on {like.device}."
        )
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is of {x.dtype}: convert it to {' or '.join(map(str, dtypes))}.")


def _check_strides(x: Tensor) -> None:
    # offsets within a tile of up to 128 rows are 32 bits wide
    if any(x.stride(dim) >= _MAX_STRIDE and x.shape[dim] > 1 for dim in (-2, -1)):
        raise ValueError(
            f"a matrix has strides {x.stride()[-2:]}, and kernels take them below {_MAX_STRIDE}: make it contiguous."
        )


def _check_apart(out: Tensor, a: Tensor, b: Tensor) -> None:
    # a compiler traces without addresses and can compare the objects only
    same = out is a or out is b
    if not torch.compiler.is_compiling():
        same = same or out.data_ptr() in (a.data_ptr(), b.data_ptr())
    if same and out.numel():
        raise ValueError("out shares memory with a factor, which other tiles still read: pass memory of its own.")

"""What the estimators that need two products make of them: y, with the noise of the outputs, and dX."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.launch import NOT_SPECIALIZED
from fusedbayes.kernels.math import SMALLEST_NORMAL, reciprocal, sqrt
from fusedbayes.kernels.noise import FLIPOUT_OUTPUT, LOCAL, load_key, negative_quads
from fusedbayes.kernels.quads import load_quads, normal_quads, quad_columns, store_quads

BLOCK = 1024  # outputs of a program


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _combine_kernel(
    y_ptr,  # (rows, N)
    slope_ptr,  # (rows, N), or None
    first_ptr,  # (SPLITS, products, N), each split `stride_split` after the one before
    second_ptr,  # likewise
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    products,  # rows of the products: as many as of y, or those of the one batch that all samples share
    M,  # rows of a Monte Carlo sample
    N,
    stride_split,
    row_quad,
    stream,
    SPLITS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    COLUMN_SHIFT: tl.constexpr,  # outputs of its first quad that a shard leaves out
    WHOLE_QUADS: tl.constexpr,  # 4 divides N, and COLUMN_SHIFT is 0
    LARGEST: tl.constexpr,  # number of slope's dtype
    BLOCK: tl.constexpr,
):
    """Of the sums m and v over the splits: y = m + sqrt(v) zeta and slope = zeta / (2 sqrt(v)), or y = m + v s.

    Grid: (rows * cdiv(N + COLUMN_SHIFT, BLOCK),).
    """
    if WHOLE_QUADS:
        N = N // 4 * 4  # for the compiler to see
    tiles = tl.cdiv(N + COLUMN_SHIFT, BLOCK)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    column = tile * BLOCK - COLUMN_SHIFT
    columns, exist = quad_columns(column, N, COLUMN_SHIFT, WHOLE_QUADS, False, BLOCK)
    start = row.to(tl.int64) * N + column
    first = tl.zeros((BLOCK // 4, 4), tl.float32)
    second = first
    for split in tl.static_range(SPLITS):
        here = (row % products).to(tl.int64) * N + column + split * tl.cast(stride_split, tl.int64)
        first += load_quads(first_ptr + here, columns, exist, 0.0, WHOLE_QUADS)
        second += load_quads(second_ptr + here, columns, exist, 0.0, WHOLE_QUADS)
    seed, sample = load_key(seed_ptr, sample_ptr)
    sample += row // M
    quads = row_quad + tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[:, None]
    if ESTIMATOR == "local":
        zeta = normal_quads(seed, quads, row % M, sample, tl.cast(stream, tl.uint32) + LOCAL)
        root = sqrt(second)
        y = first + root * zeta
        # Where nothing varies the output has no derivative by its variance: 0.
        slope = tl.where(root > 0.0, 0.5 * zeta * reciprocal(tl.maximum(root, SMALLEST_NORMAL)), 0.0)
        slope = tl.minimum(tl.maximum(slope, -LARGEST), LARGEST)
        store_quads(slope_ptr + start, columns, slope, exist, WHOLE_QUADS)
    else:
        negative = negative_quads(seed, quads, row % M, sample, tl.cast(stream, tl.uint32) + FLIPOUT_OUTPUT)
        y = first + tl.where(negative, -second, second)
    store_quads(y_ptr + start, columns, y, exist, WHOLE_QUADS)


@triton.jit
def second_term(product, x, second_x, ESTIMATOR: tl.constexpr):
    """What the second product adds to dX: 2 x times it, or r times it for the random signs r.

    r is what makes x r, the second operand, of x: it is in their sign bits, also of a 0.
    """
    x, second_x = x.to(tl.float32), second_x.to(tl.float32)
    if ESTIMATOR == "local":
        term = 2.0 * x * product
    else:
        negative = (x.to(tl.int32, bitcast=True) ^ second_x.to(tl.int32, bitcast=True)) < 0
        term = tl.where(negative, -product, product)
    return term


@triton.jit
def _combine_input_kernel(
    grad_x_ptr,  # (elements,): the first product, and dX afterwards
    second_ptr,  # (elements,)
    x_ptr,  # (elements,)
    second_x_ptr,  # (elements,)
    elements,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dX = dY mu + `second_term`. Grid: (cdiv(elements, BLOCK),)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exist = offsets < elements
    first = tl.load(grad_x_ptr + offsets, mask=exist).to(tl.float32)
    second = tl.load(second_ptr + offsets, mask=exist).to(tl.float32)
    x, second_x = tl.load(x_ptr + offsets, mask=exist), tl.load(second_x_ptr + offsets, mask=exist)
    grad_x = first + second_term(second, x, second_x, ESTIMATOR)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=exist)


def combine_input(grad_x: Tensor, second: Tensor, x: Tensor, second_x: Tensor, estimator: str) -> None:
    """Makes dX (rows, K) of the first product, given both products and both operands, all of them row-major."""
    elements = grad_x.numel()
    if elements > 0:
        grid = (triton.cdiv(elements, BLOCK),)
        _combine_input_kernel[grid](grad_x, second, x, second_x, elements, ESTIMATOR=estimator, BLOCK=BLOCK)


def combine(
    y: Tensor,
    first: Tensor,
    second: Tensor,
    key: tuple[Tensor, Tensor | None],
    address: Sequence[int],
    num_samples: int,
    estimator: str,
) -> Tensor:
    """Fills y (rows, N) from both products (splits, rows, N); returns the slope, without an element if there is none.

    Args:
        first, second: of the same strides between splits, row-major in each; perhaps of fewer rows, which repeat.
        key: the seed, and the first Monte Carlo sample.
        address: of the weight's noise.
        num_samples: that divide the rows.
        estimator: "local" or "flipout".
    """
    rows, N = y.shape
    stream, row_offset, _ = address
    shift = row_offset % 4
    slope = y.new_empty(y.shape if estimator == "local" else (0, num_samples))
    if y.numel() == 0:
        return slope
    _combine_kernel[(rows * triton.cdiv(N + shift, BLOCK),)](
        y,
        slope,
        first,
        second,
        *key,
        first.shape[1],
        rows // num_samples,
        N,
        first.stride(0),
        row_offset // 4,
        stream,
        SPLITS=first.shape[0],
        ESTIMATOR=estimator,
        COLUMN_SHIFT=shift,
        WHOLE_QUADS=shift == 0 and N % 4 == 0,
        LARGEST=torch.finfo(y.dtype).max,
        BLOCK=BLOCK,
    )
    return slope

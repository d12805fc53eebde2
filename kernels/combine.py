"""The second stage of the estimators that need two products: y from both, with the noise of the outputs."""

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

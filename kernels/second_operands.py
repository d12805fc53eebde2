"""What the second product of the estimators "local" and "flipout" multiplies sigma^2 and sigma eps with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.launch import NOT_SPECIALIZED
from fusedbayes.kernels.noise import FLIPOUT_INPUT, FLIPOUT_OUTPUT, load_key, negative_quads
from fusedbayes.kernels.quads import load_quads, quad_columns, store_quads

BLOCK = 1024  # columns of a program


class Operands(NamedTuple):
    """What the gradients are products of.

    Attributes:
        grad_y, x: dY (rows, N) and x (rows, K), of any strides; row-major if there are others in their places.
        second_grad, second_x: what takes their places in the second product of an estimator that has one; otherwise
            they themselves.
    """

    grad_y: Tensor
    x: Tensor
    second_grad: Tensor
    second_x: Tensor


def backward_operands(
    grad_y: Tensor,
    slope: Tensor,
    x: Tensor,
    key: tuple[Tensor, Tensor | None],
    address: Sequence[int],
    num_samples: int,
    estimator: str,
) -> Operands:
    """The operands of all products of a backward pass; see `second_operands`."""
    if estimator == "shared":
        return Operands(grad_y, x, grad_y, x)
    grad_y, x = grad_y.contiguous(), x.contiguous()
    second_x, second_grad = second_operands(x, grad_y, slope, key, address, num_samples, estimator)
    assert second_grad is not None
    return Operands(grad_y, x, second_grad, second_x)


@triton.jit
def _row(
    out_ptr,  # (rows, C) row-major
    in_ptr,  # (rows, C) row-major
    slope_ptr,  # (rows, C) row-major, or None
    noise,  # seed, quad offset, row within its sample, sample, stream
    row,
    tile,
    C,
    ESTIMATOR: tl.constexpr,
    COLUMN_SHIFT: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of one row: with its random signs, times the slope, or squared."""
    if WHOLE_QUADS:
        C = C // 4 * 4  # for the compiler to see
    seed, quad_offset, batch, sample, stream = noise
    columns, exist = quad_columns(tile * BLOCK - COLUMN_SHIFT, C, COLUMN_SHIFT, WHOLE_QUADS, False, BLOCK)
    start = row.to(tl.int64) * C + tile * BLOCK - COLUMN_SHIFT
    values = load_quads(in_ptr + start, columns, exist, 0.0, WHOLE_QUADS)
    if ESTIMATOR == "flipout":
        quads = quad_offset + tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[:, None]
        # A product, as in Triton the negative of a 0 is 0: `second_term` reads the signs from what is stored here.
        values *= tl.where(negative_quads(seed, quads, batch, sample, stream), -1.0, 1.0)
    elif slope_ptr is not None:
        values *= load_quads(slope_ptr + start, columns, exist, 0.0, WHOLE_QUADS)
    else:
        values *= values
    store_quads(out_ptr + start, columns, values, exist, WHOLE_QUADS)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _second_operands_kernel(
    second_x_ptr,  # (rows, K)
    second_grad_ptr,  # (rows, N), or None
    x_ptr,  # (rows, K)
    grad_y_ptr,  # (rows, N), or None
    slope_ptr,  # (rows, N), or None
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    M,  # rows of a Monte Carlo sample
    N,
    K,
    row_quad,
    quad_offset,
    stream,
    ESTIMATOR: tl.constexpr,
    ROW_SHIFT: tl.constexpr,  # of the weight's rows, which are the columns of dY: those of its first quad left out
    COLUMN_SHIFT: tl.constexpr,  # likewise of its columns
    N_QUADS: tl.constexpr,  # 4 divides N, and ROW_SHIFT is 0
    K_QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x^2 and dY times the slope, or x r and dY s. Grid: (rows, tiles of x's columns and then of dY's)."""
    row, tile = tl.program_id(0), tl.program_id(1)
    seed, sample = load_key(seed_ptr, sample_ptr)
    sample += row // M
    stream = tl.cast(stream, tl.uint32)
    tiles_k = tl.cdiv(K + COLUMN_SHIFT, BLOCK)
    if tile < tiles_k:
        noise = (seed, quad_offset, row % M, sample, stream + FLIPOUT_INPUT)
        _row(second_x_ptr, x_ptr, None, noise, row, tile, K, ESTIMATOR, COLUMN_SHIFT, K_QUADS, BLOCK)
    elif grad_y_ptr is not None:
        tile -= tiles_k
        noise = (seed, row_quad, row % M, sample, stream + FLIPOUT_OUTPUT)
        _row(second_grad_ptr, grad_y_ptr, slope_ptr, noise, row, tile, N, ESTIMATOR, ROW_SHIFT, N_QUADS, BLOCK)


def second_operands(
    x: Tensor,
    grad_y: Tensor | None,
    slope: Tensor | None,
    key: tuple[Tensor, Tensor | None],
    address: Sequence[int],
    num_samples: int,
    estimator: str,
) -> tuple[Tensor, Tensor | None]:
    """What takes the place of x (rows, K) and, if it is given, of dY (rows, N) in the second product, in one launch.

    "local": x^2 and dY * slope, in bf16 for fp16, whose squares would overflow and underflow. "flipout": x and dY with
    the random signs of their rows and columns.

    Args:
        key: the seed, and the first Monte Carlo sample.
        address: of the weight's noise.
        num_samples: that divide the rows.
    """
    rows, K = x.shape
    N = 0 if grad_y is None else grad_y.shape[1]
    stream, row_offset, column_offset = address
    wide = x.dtype == torch.float16 and estimator == "local"
    dtype = torch.bfloat16 if wide else x.dtype
    second_x = x.new_empty((rows, K), dtype=dtype)
    second_grad = None if grad_y is None else grad_y.new_empty((rows, N), dtype=dtype)
    row_shift, shift = row_offset % 4, column_offset % 4
    tiles = triton.cdiv(K + shift, BLOCK) + (0 if grad_y is None else triton.cdiv(N + row_shift, BLOCK))
    if rows * tiles > 0:
        _second_operands_kernel[(rows, tiles)](
            second_x,
            second_grad,
            x.contiguous(),
            None if grad_y is None else grad_y.contiguous(),
            slope if estimator == "local" and grad_y is not None else None,
            *key,
            rows // num_samples,
            N,
            K,
            row_offset // 4,
            column_offset // 4,
            stream,
            ESTIMATOR=estimator,
            ROW_SHIFT=row_shift,
            COLUMN_SHIFT=shift,
            N_QUADS=row_shift == 0 and N % 4 == 0,
            K_QUADS=shift == 0 and K % 4 == 0,
            BLOCK=BLOCK,
        )
    return second_x, second_grad

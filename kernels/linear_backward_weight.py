"""dmu and drho of weight and bias from dL/dW = dY^T X, without storing it or the noise."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.bias import store_bias_gradients, sum_over_batch
from fusedbayes.kernels.config import MatmulConfig
from fusedbayes.kernels.launch import (
    NOT_SPECIALIZED,
    Parameter,
    bias_noise,
    dot_options,
    whole_quads,
    with_near_rows,
)
from fusedbayes.kernels.noise import Noise, load_key
from fusedbayes.kernels.parameter import Gradients, gaussian, new_gradients
from fusedbayes.kernels.second_operands import Operands
from fusedbayes.kernels.weight_tile import BatchTiles, WeightTile, batch_step, quarters, store_tile


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_backward_weight_kernel(
    grads,  # `Gradients` (N, K) row-major
    bias_grads,  # `Gradients` (N,), used if there is a bias
    grad_y_ptr,  # (M, N)
    bias_grad_ptr,  # (bias_M, N): dY, or for a long batch its sum
    grad_kl_ptr,  # () fp32, or None
    x_ptr,  # (M, K)
    weight,  # a `Gaussian` (N, K)
    bias,  # a `Gaussian` (N,), perhaps of None
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    M,
    bias_M,
    N,
    K,
    stride_gm,
    stride_gn,
    stride_bm,
    stride_bn,
    stride_xm,
    stride_xk,
    row_offset,
    quad_offset,
    stream,
    bias_row,
    bias_column,
    bias_stream,
    EVEN_M: tl.constexpr,  # BLOCK_M divides M
    GRAD_QUADS: tl.constexpr,  # grad_y has whole quads of adjacent columns
    X_QUADS: tl.constexpr,  # x has, too
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G = dY^T X over the batch, then dmu and drho of `gaussian_gradients` in registers, eps drawn again.

    Grid: (cdiv(N, BLOCK_N) * cdiv(K, BLOCK_K),): one dimension, because the second ends at 65535. The first tile of
    columns also sums dY over the batch for the bias. 4 divides K and the shard's first column.
    """
    K = K // 4 * 4  # for the compiler to see
    if GRAD_QUADS:
        stride_gm = stride_gm // 4 * 4
    if X_QUADS:
        stride_xm = stride_xm // 4 * 4
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile_n, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    # Tiles that would stick out move back; what they share with their neighbours both compute and write alike.
    first_row, first_column = tl.minimum(tile_n * BLOCK_N, N - BLOCK_N), tl.minimum(tile_k * BLOCK_K, K - BLOCK_K)
    in_tile, batch = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    grad_y_ptr += first_row.to(tl.int64) * stride_gn
    x_ptr += first_column.to(tl.int64) * stride_xk
    grad_y_offsets = batch[None, :] * stride_gm + in_tile[:, None] * stride_gn
    x_offsets = batch[:, None] * stride_xm + tl.arange(0, BLOCK_K)[None, :] * stride_xk
    tiles = BatchTiles(grad_y_ptr, grad_y_offsets, stride_gm, x_ptr, x_offsets, stride_xm, M)
    grad_weight = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for tile_m in range(M // BLOCK_M):
        grad_weight = batch_step(grad_weight, tile_m, tiles, False, DOT_DTYPE, INPUT_PRECISION)
    if not EVEN_M:
        grad_weight = batch_step(grad_weight, M // BLOCK_M, tiles, True, DOT_DTYPE, INPUT_PRECISION)

    seed, sample = load_key(seed_ptr, sample_ptr)
    rows = first_row + in_tile
    noise = Noise(seed, row_offset + rows, quad_offset + first_column // 4, sample, stream)
    tile = WeightTile(first_row.to(tl.int64) * K + first_column, in_tile, noise, K)
    pieces = quarters(grad_weight)
    store_tile(grads, pieces, pieces, grad_kl_ptr, weight, tile, "eps")
    if bias.mu is not None:
        if tile_k == 0:
            drawn = Noise(seed, bias_row, tl.cast(bias_column, tl.int64) + rows, sample, bias_stream)
            sums = sum_over_batch(bias_grad_ptr, None, drawn, 1, bias_M, N, stride_bm, stride_bn, rows, "shared")
            store_bias_gradients(bias_grads, sums, grad_kl_ptr, bias, rows, N, "shared", False)


def weight_gradients(
    operands: Operands,
    bias_grad: Tensor,
    grad_kl: Tensor | None,
    weight: Parameter,
    bias: Sequence[Tensor | None],
    key: tuple[Tensor, Tensor | None],
    addresses: tuple[Sequence[int], Sequence[int]],
    config: MatmulConfig,
) -> tuple[Gradients, Gradients]:
    """dmu and drho of weight and bias for one weight that all rows share; `bias_grad` sums up to dL/db."""
    grad_y = with_near_rows(operands.grad_y, config.block_m, config.block_n)
    x = with_near_rows(operands.x, config.block_m, config.block_k)
    (M, N), K = grad_y.shape, x.shape[1]
    stream, row_offset, column_offset = addresses[0]
    grads, bias_grads = new_gradients(weight, weight[0]), new_gradients(bias, weight[0])
    parameter = gaussian(weight)
    _linear_backward_weight_kernel[(triton.cdiv(N, config.block_n) * triton.cdiv(K, config.block_k),)](
        grads,
        bias_grads,
        grad_y,
        bias_grad,
        grad_kl,
        x,
        parameter,
        gaussian(bias),
        *key,
        M,
        bias_grad.shape[0],
        N,
        K,
        *grad_y.stride(),
        *bias_grad.stride(),
        *x.stride(),
        row_offset,
        column_offset // 4,
        stream,
        *bias_noise(addresses[1]),
        EVEN_M=M % config.block_m == 0,
        GRAD_QUADS=whole_quads(grad_y.stride()),
        X_QUADS=whole_quads(x.stride()),
        **dot_options(x),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # Priors that are loaded need registers too.
        maxnreg=config.max_registers if parameter.PRIOR_MU_SCALAR and parameter.PRIOR_SIGMA_SCALAR else None,
    )
    return grads, bias_grads

"""dmu and drho of weight and bias from dL/dW = dY^T X, without storing it or the noise."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.bias import store_bias_gradients, sum_over_batch
from fusedbayes.kernels.config import MatmulConfig, fits
from fusedbayes.kernels.gaussian import gaussian_gradients
from fusedbayes.kernels.launch import (
    NOT_SPECIALIZED,
    allow_tf32,
    bias_noise,
    capability,
    dot_options,
    whole_quads,
    with_near_rows,
)
from fusedbayes.kernels.noise import Noise, load_key, normal_tile
from fusedbayes.kernels.parameter import gaussian, load_elements, new_gradients, open_prior, prior_at
from fusedbayes.kernels.sample_backward import sample_layer_backward
from fusedbayes.kernels.select import select_config

# Batch rows beyond which the library sums dY for the bias. Here few programs do it, 16 rows at a time, while the others
# work; with a long batch they would be the last.
LONG_BATCH = 512


class _Operands(NamedTuple):
    """The product's: pointers at the tile's first row and column, offsets in the first tile of batch rows."""

    grad_y_ptr: Any
    grad_y_offsets: Any  # (BLOCK_N, BLOCK_M)
    stride_gm: Any
    x_ptr: Any
    x_offsets: Any  # (BLOCK_M, BLOCK_K)
    stride_xm: Any
    M: Any


@triton.jit
def _step(grad_weight, tile_m, operands, MASKED: tl.constexpr, DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """One tile of batch rows: multiply, add to dL/dW (BLOCK_N, BLOCK_K)."""
    BLOCK_M: tl.constexpr = operands.x_offsets.shape[0]
    first = tl.cast(tile_m * BLOCK_M, tl.int64)
    exist, x_exist = None, None
    if MASKED:
        batch = first + tl.arange(0, BLOCK_M)
        exist, x_exist = (batch < operands.M)[None, :], (batch < operands.M)[:, None]
    grad_y = load_elements(operands.grad_y_ptr + first * operands.stride_gm, operands.grad_y_offsets, exist, 0.0)
    x = load_elements(operands.x_ptr + first * operands.stride_xm, operands.x_offsets, x_exist, 0.0)
    return tl.dot(grad_y.to(DOT_DTYPE), x.to(DOT_DTYPE), grad_weight, input_precision=INPUT_PRECISION)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns: registers of the tensor cores' layout, so nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _store_gradients(
    grads,  # `Gradients` (N, K)
    grad_weight,  # a piece of dL/dW, fp32
    grad_kl,
    weight,  # a `Gaussian` (N, K)
    prior,  # of `open_prior`
    noise,  # of the piece
    offsets,  # of the piece
    WITH_KL: tl.constexpr,
):
    """dmu and drho of one piece of the tile."""
    eps = normal_tile(*noise)
    mu = tl.load(weight.mu + offsets).to(tl.float32)
    rho = tl.load(weight.rho + offsets).to(tl.float32)
    prior_mu, prior_sigma = prior
    if WITH_KL:
        prior_mu, prior_sigma = prior_at(prior, offsets, None)
    grad_mu, grad_rho = gaussian_gradients(grad_weight, grad_kl, mu, rho, eps, prior_mu, prior_sigma, WITH_KL)
    tl.store(grads.mu + offsets, grad_mu.to(grads.mu.dtype.element_ty))
    tl.store(grads.rho + offsets, grad_rho.to(grads.rho.dtype.element_ty))


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
    operands = _Operands(grad_y_ptr, grad_y_offsets, stride_gm, x_ptr, x_offsets, stride_xm, M)
    grad_weight = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for tile_m in range(M // BLOCK_M):
        grad_weight = _step(grad_weight, tile_m, operands, False, DOT_DTYPE, INPUT_PRECISION)
    if not EVEN_M:
        grad_weight = _step(grad_weight, M // BLOCK_M, operands, True, DOT_DTYPE, INPUT_PRECISION)

    seed, sample = load_key(seed_ptr, sample_ptr)
    WITH_KL: tl.constexpr = grad_kl_ptr is not None
    grad_kl, prior = 0.0, (0.0, 1.0)
    if WITH_KL:
        grad_kl, prior = tl.load(grad_kl_ptr), open_prior(weight, 0)
    # In quarters: the whole tile's mu, rho, eps and gradients at once would not fit the registers.
    left_half, right_half = _halves(grad_weight)
    pieces = _halves(left_half) + _halves(right_half)
    PIECE: tl.constexpr = BLOCK_K // 4
    start = first_row.to(tl.int64) * K + first_column
    rows = first_row + in_tile
    for i in tl.static_range(4):
        offsets = start + (in_tile[:, None] * K + (i * PIECE + tl.arange(0, PIECE))[None, :])
        quads = quad_offset + (first_column + i * PIECE) // 4 + tl.arange(0, PIECE // 4)
        noise = Noise(seed, row_offset + rows, quads, sample, stream)
        _store_gradients(grads, pieces[i], grad_kl, weight, prior, noise, offsets, WITH_KL)
    if bias.mu is not None:
        if tile_k == 0:
            grad_bias = sum_over_batch(bias_grad_ptr, bias_M, N, stride_bm, stride_bn, rows)
            drawn = Noise(seed, bias_row, tl.cast(bias_column, tl.int64) + rows, sample, bias_stream)
            store_bias_gradients(bias_grads, grad_bias, grad_kl_ptr, bias, drawn, rows, N)


def _product(grad_y: Tensor, x: Tensor) -> Tensor:
    """dY^T X by the library, not rounded to 16 bits on the way to fp32 gradients."""
    if grad_y.is_cuda and grad_y.dtype != torch.float32:
        return torch.mm(grad_y.t(), x, out_dtype=torch.float32)
    return grad_y.t().float() @ x.float()


def bayes_linear_backward_weight(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    weight_prior_mu: Tensor | None,
    weight_prior_sigma: Tensor | None,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    bias_prior_mu: Tensor | None,
    bias_prior_sigma: Tensor | None,
    seed: Tensor,
    sample: Tensor | None,
    weight_address: Sequence[int],
    bias_address: Sequence[int],
    config: MatmulConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dmu and drho of weight and bias; see the operator of this name."""
    (M, N), K = grad_y.shape, weight_mu.shape[1]
    shape = (M, N, K)
    config = config or select_config("backward_weight", shape, x.dtype, capability(x), allow_tf32())
    weight = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    stream, row_offset, column_offset = weight_address
    bias_grad = grad_y
    if bias_mu is not None and M > LONG_BATCH:
        bias_grad = grad_y.sum(0, keepdim=True, dtype=torch.float32)
    if not (config.single_pass and fits("backward_weight", config, shape) and column_offset % 4 == 0):
        key, addresses = (seed, sample), (weight_address, bias_address)
        return sample_layer_backward(_product(grad_y, x), bias_grad, grad_kl, weight, bias, key, addresses)
    grad_y = with_near_rows(grad_y, max(config.block_m, config.block_n))
    x = with_near_rows(x, max(config.block_m, config.block_k))
    grads, bias_grads = new_gradients(weight, weight_mu), new_gradients(bias, weight_mu)
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
        seed,
        sample,
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
        *bias_noise(bias_address),
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
    return *grads, *bias_grads

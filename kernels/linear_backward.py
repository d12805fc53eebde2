"""Gradients of `linear`: dX = dY W with W drawn again, and dmu, drho from dY^T X without storing dW or the noise."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.config import MatmulConfig, select_config
from fusedbayes.kernels.gaussian import load_fp32, sigma_from_rho, store_gradients
from fusedbayes.kernels.launch import NOT_SPECIALIZED, capability, contiguous, dot_options, is_scalar
from fusedbayes.kernels.noise import column_tile, load_key, normal_tile
from fusedbayes.kernels.sample import sample_weight


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_backward_input_kernel(
    grad_x_ptr,  # (M, K) row-major
    grad_y_ptr,  # (M, N)
    mu_ptr,  # (N, K) row-major
    rho_ptr,  # (N, K) row-major
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    M,
    N,
    K,
    stride_gm,
    stride_gn,
    row_offset,
    quad_offset,
    stream,
    COLUMN_SHIFT: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dX = dY W, the loop over N drawing the forward's W again.

    Grid: (cdiv(K + COLUMN_SHIFT, BLOCK_K), cdiv(M, BLOCK_M)).
    """
    tile_k, tile_m = tl.program_id(0), tl.program_id(1)
    batch = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, exist, quads = column_tile(tile_k, K, quad_offset, COLUMN_SHIFT, BLOCK_K)
    grad_y_rows = grad_y_ptr + batch.to(tl.int64)[:, None] * stride_gm
    seed, sample = load_key(seed_ptr, sample_ptr)
    grad_x = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for tile_n in range(tl.cdiv(N, BLOCK_N)):
        rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_bounds = (rows[:, None] < N) & exist[None, :]
        offsets = rows.to(tl.int64)[:, None] * K + columns[None, :]
        mu = load_fp32(mu_ptr, offsets, in_bounds)
        rho = load_fp32(rho_ptr, offsets, in_bounds)
        grad_y = tl.load(
            grad_y_rows + rows.to(tl.int64)[None, :] * stride_gn,
            mask=(batch[:, None] < M) & (rows[None, :] < N),
            other=0.0,
        )
        eps = normal_tile(seed, row_offset + rows, quads, sample, stream)
        weight = (mu + sigma_from_rho(rho) * eps).to(grad_y_ptr.dtype.element_ty)
        grad_x = tl.dot(grad_y.to(DOT_DTYPE), weight.to(DOT_DTYPE), grad_x, input_precision=INPUT_PRECISION)
    tl.store(
        grad_x_ptr + batch.to(tl.int64)[:, None] * K + columns[None, :],
        grad_x.to(grad_x_ptr.dtype.element_ty),
        mask=(batch[:, None] < M) & exist[None, :],
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_backward_weight_kernel(
    grad_mu_ptr,  # (N, K) row-major
    grad_rho_ptr,  # (N, K) row-major
    grad_y_ptr,  # (M, N)
    grad_kl_ptr,  # () fp32, or None
    x_ptr,  # (M, K)
    mu_ptr,  # (N, K) row-major
    rho_ptr,  # (N, K) row-major
    prior_mu_ptr,  # () or (N, K) row-major
    prior_sigma_ptr,  # () or (N, K) row-major
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    M,
    N,
    K,
    stride_gm,
    stride_gn,
    stride_xm,
    stride_xk,
    row_offset,
    quad_offset,
    stream,
    COLUMN_SHIFT: tl.constexpr,
    PRIOR_MU_SCALAR: tl.constexpr,
    PRIOR_SIGMA_SCALAR: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G = dY^T X over the batch, then dmu and drho of `gaussian_gradients` in registers, eps drawn again.

    Grid: (cdiv(N, BLOCK_N) * cdiv(K + COLUMN_SHIFT, BLOCK_K),): one dimension, because the second ends at 65535.
    """
    tiles_k = tl.cdiv(K + COLUMN_SHIFT, BLOCK_K)
    tile_n, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns, exist, quads = column_tile(tile_k, K, quad_offset, COLUMN_SHIFT, BLOCK_K)
    grad_y_columns = grad_y_ptr + rows.to(tl.int64)[:, None] * stride_gn
    x_columns = x_ptr + columns.to(tl.int64)[None, :] * stride_xk
    grad_weight = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for tile_m in range(tl.cdiv(M, BLOCK_M)):
        batch = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        grad_y = tl.load(
            grad_y_columns + batch.to(tl.int64)[None, :] * stride_gm,
            mask=(rows[:, None] < N) & (batch[None, :] < M),
            other=0.0,
        )
        x = tl.load(
            x_columns + batch.to(tl.int64)[:, None] * stride_xm,
            mask=(batch[:, None] < M) & exist[None, :],
            other=0.0,
        )
        grad_weight = tl.dot(grad_y.to(DOT_DTYPE), x.to(DOT_DTYPE), grad_weight, input_precision=INPUT_PRECISION)
    in_bounds = (rows[:, None] < N) & exist[None, :]
    offsets = rows.to(tl.int64)[:, None] * K + columns[None, :]
    seed, sample = load_key(seed_ptr, sample_ptr)
    eps = normal_tile(seed, row_offset + rows, quads, sample, stream)
    store_gradients(
        grad_mu_ptr,
        grad_rho_ptr,
        grad_weight,
        eps,
        grad_kl_ptr,
        mu_ptr,
        rho_ptr,
        prior_mu_ptr,
        prior_sigma_ptr,
        offsets,
        in_bounds,
        PRIOR_MU_SCALAR,
        PRIOR_SIGMA_SCALAR,
    )


def bayes_linear_backward_input(
    grad_y: Tensor,
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
    config: MatmulConfig | None = None,
) -> Tensor:
    """dX; see the operator of this name."""
    (M, N), K = grad_y.shape, mu.shape[1]
    stream, row_offset, column_offset = address
    config = config or select_config("backward_input", (M, N, K), grad_y.dtype, capability(grad_y))
    if not config.single_pass:
        weight, _ = sample_weight(mu, rho, None, None, seed, sample, address, grad_y.dtype, False)
        return grad_y @ weight
    grad_x = grad_y.new_empty((M, K))
    if M > 0:
        _linear_backward_input_kernel[
            (triton.cdiv(K + column_offset % 4, config.block_k), triton.cdiv(M, config.block_m))
        ](
            grad_x,
            grad_y,
            mu.contiguous(),
            rho.contiguous(),
            seed,
            sample,
            M,
            N,
            K,
            *grad_y.stride(),
            row_offset,
            column_offset // 4,
            stream,
            COLUMN_SHIFT=column_offset % 4,
            **dot_options(grad_y),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return grad_x


def bayes_linear_backward_weight(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
    config: MatmulConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """dmu and drho; see the operator of this name."""
    (M, N), K = grad_y.shape, mu.shape[1]
    stream, row_offset, column_offset = address
    config = config or select_config("backward_weight", (M, N, K), x.dtype, capability(x))
    grad_mu, grad_rho = mu.new_empty((N, K)), rho.new_empty((N, K))
    _linear_backward_weight_kernel[
        (triton.cdiv(N, config.block_n) * triton.cdiv(K + column_offset % 4, config.block_k),)
    ](
        grad_mu,
        grad_rho,
        grad_y,
        grad_kl,
        x,
        mu.contiguous(),
        rho.contiguous(),
        contiguous(prior_mu),
        contiguous(prior_sigma),
        seed,
        sample,
        M,
        N,
        K,
        *grad_y.stride(),
        *x.stride(),
        row_offset,
        column_offset // 4,
        stream,
        COLUMN_SHIFT=column_offset % 4,
        PRIOR_MU_SCALAR=is_scalar(prior_mu),
        PRIOR_SIGMA_SCALAR=is_scalar(prior_sigma),
        **dot_options(x),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return grad_mu, grad_rho

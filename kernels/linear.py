"""y = x W^T + b with W drawn inside the product: one pass over (mu, rho) gives the output and the KL."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.config import MatmulConfig, select_config
from fusedbayes.kernels.gaussian import gaussian_kl, load_fp32, load_prior, sigma_from_rho
from fusedbayes.kernels.launch import NOT_SPECIALIZED, as_row, capability, contiguous, dot_options, is_scalar
from fusedbayes.kernels.noise import column_tile, load_key, normal_tile
from fusedbayes.kernels.sample import sample_weight


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_forward_kernel(
    y_ptr,  # (M, N) row-major
    kl_ptr,  # (cdiv(N, BLOCK_N),) fp32 partial sums, or None
    x_ptr,  # (M, K)
    mu_ptr,  # (N, K) row-major
    rho_ptr,  # (N, K) row-major
    prior_mu_ptr,  # () or (N, K) row-major
    prior_sigma_ptr,  # () or (N, K) row-major
    bias_ptr,  # (N,) or None
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    M,
    N,
    K,
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
    """y^T = W x^T + b, the sampled tile on the tensor cores' M side. Grid: (cdiv(N, BLOCK_N), cdiv(M, BLOCK_M)).

    Every tile of batch rows draws the same W; only the first one adds up its KL.
    """
    tile_n, tile_m = tl.program_id(0), tl.program_id(1)
    batch = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + batch.to(tl.int64)[None, :] * stride_xm
    weight_rows = rows.to(tl.int64)[:, None] * K
    seed, sample = load_key(seed_ptr, sample_ptr)
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    kl = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for tile_k in range(tl.cdiv(K + COLUMN_SHIFT, BLOCK_K)):
        columns, exist, quads = column_tile(tile_k, K, quad_offset, COLUMN_SHIFT, BLOCK_K)
        in_bounds = (rows[:, None] < N) & exist[None, :]
        offsets = weight_rows + columns[None, :]
        mu = load_fp32(mu_ptr, offsets, in_bounds)
        sigma = sigma_from_rho(load_fp32(rho_ptr, offsets, in_bounds))
        x = tl.load(
            x_rows + columns.to(tl.int64)[:, None] * stride_xk,
            mask=exist[:, None] & (batch[None, :] < M),
            other=0.0,
        )
        eps = normal_tile(seed, row_offset + rows, quads, sample, stream)
        weight = (mu + sigma * eps).to(x_ptr.dtype.element_ty)
        y = tl.dot(weight.to(DOT_DTYPE), x.to(DOT_DTYPE), y, input_precision=INPUT_PRECISION)
        if kl_ptr is not None:
            if tile_m == 0:
                prior_mu = load_prior(prior_mu_ptr, offsets, in_bounds, PRIOR_MU_SCALAR)
                prior_sigma = load_prior(prior_sigma_ptr, offsets, in_bounds, PRIOR_SIGMA_SCALAR)
                kl += tl.where(in_bounds, gaussian_kl(mu, sigma, prior_mu, prior_sigma), 0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + batch.to(tl.int64)[None, :] * N + rows[:, None],
        y.to(y_ptr.dtype.element_ty),
        mask=(rows[:, None] < N) & (batch[None, :] < M),
    )
    if kl_ptr is not None:
        if tile_m == 0:
            tl.store(kl_ptr + tile_n, tl.sum(kl))


def _single_pass(
    x: Tensor,
    parameter: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    bias: Tensor | None,
    key: tuple[Tensor, Tensor | None],
    address: Sequence[int],
    with_kl: bool,
    config: MatmulConfig,
) -> tuple[Tensor, Tensor]:
    mu, rho, prior_mu, prior_sigma = parameter
    stream, row_offset, column_offset = address
    (M, K), N = x.shape, mu.shape[0]
    tiles_n, tiles_m = triton.cdiv(N, config.block_n), triton.cdiv(M, config.block_m)
    y = x.new_empty((M, N))
    kl = mu.new_empty(tiles_n if with_kl else 0, dtype=torch.float32)
    _linear_forward_kernel[(tiles_n, tiles_m)](
        y,
        kl if with_kl else None,
        x,
        mu.contiguous(),
        rho.contiguous(),
        contiguous(prior_mu),
        contiguous(prior_sigma),
        bias,
        *key,
        M,
        N,
        K,
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
    return y, kl.sum() if with_kl else kl


def bayes_linear(
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
    with_kl: bool,
    config: MatmulConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the KL of weight and bias; see the operator of this name."""
    shape = (x.shape[0], *weight_mu.shape)
    config = config or select_config("forward", shape, x.dtype, capability(x))
    weight = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    bias = bias_kl = None
    if bias_mu is not None and bias_rho is not None:
        bias_2d = (bias_mu[None], bias_rho[None], as_row(bias_prior_mu), as_row(bias_prior_sigma))
        row, bias_kl = sample_weight(*bias_2d, seed, sample, bias_address, x.dtype, with_kl)
        bias = row[0]
    if config.single_pass and x.shape[0] > 0:
        y, kl = _single_pass(x, weight, bias, (seed, sample), weight_address, with_kl, config)
    else:
        sampled, kl = sample_weight(*weight, seed, sample, weight_address, x.dtype, with_kl)
        y = x @ sampled.t() if bias is None else torch.addmm(bias, x, sampled.t())
    return y, kl + bias_kl if with_kl and bias_kl is not None else kl

"""Sampling a weight matrix once, with its KL, and the gradient of both: elementwise passes over (mu, rho)."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.config import TileConfig, select_tile_config
from fusedbayes.kernels.gaussian import gaussian_kl, load_fp32, load_prior, sigma_from_rho, store_gradients
from fusedbayes.kernels.launch import NOT_SPECIALIZED, contiguous, is_scalar
from fusedbayes.kernels.noise import column_tile, load_key, normal_tile


@triton.jit
def _tile(N, K, quad_offset, COLUMN_SHIFT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """This program's tile of an (N, K) row-major matrix: rows, global quads, offsets and which are in bounds."""
    tiles_k = tl.cdiv(K + COLUMN_SHIFT, BLOCK_K)
    rows = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    columns, exist, quads = column_tile(tl.program_id(0) % tiles_k, K, quad_offset, COLUMN_SHIFT, BLOCK_K)
    in_bounds = (rows[:, None] < N) & exist[None, :]
    return rows, quads, rows.to(tl.int64)[:, None] * K + columns[None, :], in_bounds


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _sample_weight_kernel(
    weight_ptr,  # (N, K), or None: only the KL is wanted
    kl_ptr,  # (programs,) fp32 partial sums, or None
    mu_ptr,  # (N, K) row-major
    rho_ptr,  # (N, K) row-major
    prior_mu_ptr,  # () or (N, K) row-major
    prior_sigma_ptr,  # () or (N, K) row-major
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    N,
    K,
    row_offset,
    quad_offset,
    stream,
    COLUMN_SHIFT: tl.constexpr,
    PRIOR_MU_SCALAR: tl.constexpr,
    PRIOR_SIGMA_SCALAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W = mu + softplus(rho) eps and the tile's sum of KL. Grid: one program per tile, see `_tile`."""
    rows, quads, offsets, in_bounds = _tile(N, K, quad_offset, COLUMN_SHIFT, BLOCK_N, BLOCK_K)
    mu = load_fp32(mu_ptr, offsets, in_bounds)
    sigma = sigma_from_rho(load_fp32(rho_ptr, offsets, in_bounds))
    if weight_ptr is not None:
        seed, sample = load_key(seed_ptr, sample_ptr)
        eps = normal_tile(seed, row_offset + rows, quads, sample, stream)
        tl.store(weight_ptr + offsets, (mu + sigma * eps).to(weight_ptr.dtype.element_ty), mask=in_bounds)
    if kl_ptr is not None:
        prior_mu = load_prior(prior_mu_ptr, offsets, in_bounds, PRIOR_MU_SCALAR)
        prior_sigma = load_prior(prior_sigma_ptr, offsets, in_bounds, PRIOR_SIGMA_SCALAR)
        kl = tl.where(in_bounds, gaussian_kl(mu, sigma, prior_mu, prior_sigma), 0.0)
        tl.store(kl_ptr + tl.program_id(0), tl.sum(kl))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _sample_weight_backward_kernel(
    grad_mu_ptr,  # (N, K) row-major
    grad_rho_ptr,  # (N, K) row-major
    grad_weight_ptr,  # (N, K) row-major, or None: only the KL was used
    grad_kl_ptr,  # () fp32, or None: only the sample was used
    mu_ptr,  # (N, K) row-major
    rho_ptr,  # (N, K) row-major
    prior_mu_ptr,  # () or (N, K) row-major
    prior_sigma_ptr,  # () or (N, K) row-major
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    N,
    K,
    row_offset,
    quad_offset,
    stream,
    COLUMN_SHIFT: tl.constexpr,
    PRIOR_MU_SCALAR: tl.constexpr,
    PRIOR_SIGMA_SCALAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dmu and drho (see `gaussian_gradients`), eps drawn again. Grid: one program per tile, see `_tile`."""
    rows, quads, offsets, in_bounds = _tile(N, K, quad_offset, COLUMN_SHIFT, BLOCK_N, BLOCK_K)
    grad_weight = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    eps = grad_weight
    if grad_weight_ptr is not None:
        grad_weight = load_fp32(grad_weight_ptr, offsets, in_bounds)
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


def _tiles(shape: torch.Size, address: Sequence[int], config: TileConfig) -> int:
    """Programs of a launch; none for a tensor without elements."""
    if 0 in shape:
        return 0
    return triton.cdiv(shape[0], config.block_n) * triton.cdiv(shape[1] + address[2] % 4, config.block_k)


def _launch(
    kernel: Any,
    leading: tuple[Tensor | None, ...],
    parameter: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    key: tuple[Tensor | None, Tensor | None],
    address: Sequence[int],
    config: TileConfig,
) -> None:
    """Launches one of the kernels above, whose arguments differ only in the `leading` pointers."""
    mu, rho, prior_mu, prior_sigma = parameter
    stream, row_offset, column_offset = address
    if mu.numel() == 0:
        return
    kernel[(_tiles(mu.shape, address, config),)](
        *leading,
        mu.contiguous(),
        rho.contiguous(),
        contiguous(prior_mu),
        contiguous(prior_sigma),
        *key,
        *mu.shape,
        row_offset,
        column_offset // 4,
        stream,
        COLUMN_SHIFT=column_offset % 4,
        PRIOR_MU_SCALAR=is_scalar(prior_mu),
        PRIOR_SIGMA_SCALAR=is_scalar(prior_sigma),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )


def sample_weight(
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
    dtype: torch.dtype,
    with_kl: bool,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """W and its KL; see the operator of this name."""
    config = config or select_tile_config(mu.shape)
    weight = mu.new_empty(mu.shape, dtype=dtype)
    # Partial sums are added in a fixed order, so that a run repeats bit for bit.
    kl = mu.new_empty(_tiles(mu.shape, address, config) if with_kl else 0, dtype=torch.float32)
    leading = (weight, kl if with_kl else None)
    _launch(_sample_weight_kernel, leading, (mu, rho, prior_mu, prior_sigma), (seed, sample), address, config)
    return weight, kl.sum() if with_kl else kl


def weight_kl(
    mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor, config: TileConfig | None = None
) -> Tensor:
    """The KL alone; see the operator of this name."""
    config = config or select_tile_config(mu.shape)
    address = (0, 0, 0)
    kl = mu.new_empty(_tiles(mu.shape, address, config), dtype=torch.float32)
    _launch(_sample_weight_kernel, (None, kl), (mu, rho, prior_mu, prior_sigma), (None, None), address, config)
    return kl.sum()


def sample_weight_backward(
    grad_weight: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
    seed: Tensor | None,
    sample: Tensor | None,
    address: Sequence[int],
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """dmu and drho; see the operator of this name."""
    config = config or select_tile_config(mu.shape)
    grads = mu.new_empty(mu.shape), rho.new_empty(rho.shape)
    leading = (*grads, contiguous(grad_weight), grad_kl)
    _launch(_sample_weight_backward_kernel, leading, (mu, rho, prior_mu, prior_sigma), (seed, sample), address, config)
    return grads

"""An elementwise pass over (mu, rho) that draws W and adds up its KL. Any size, any shard.

A program owns some columns of a few rows and walks down the rows. What of a Philox call depends on the columns alone is
computed once, what depends on the row alone once per row; all rows share one mask; sums over columns that do not exist
are dropped once, at the end. A layer's bias comes along in programs of its own, after those of the weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.bias import bias_moments
from fusedbayes.kernels.config import TileConfig
from fusedbayes.kernels.gaussian import kl_centres, kl_from_sums, kl_terms, sigma_from_rho
from fusedbayes.kernels.launch import (
    NOT_SPECIALIZED,
    Parameter,
    bias_noise,
)
from fusedbayes.kernels.noise import Noise, load_key, normal_vector
from fusedbayes.kernels.parameter import gaussian, open_prior
from fusedbayes.kernels.quads import (
    load_quads,
    normal_quads,
    quad_columns,
    store_quads,
    sum_quads,
    sum_squares_of_quads,
)
from fusedbayes.kernels.select import select_tile_config
from fusedbayes.kernels.sums import new_total, sum_in_order, value_of

BIAS_BLOCK = 64  # outputs of a program that draws or differentiates the bias
NO_BIAS = (None,) * 4


@triton.jit
def row_tile(tile, N, K, quad_offset, COLUMN_SHIFT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile's first row, its last and its first column, and its global quads (BLOCK_K // 4, 1).

    Tiles begin at whole quads of the global tensor; a shard that begins COLUMN_SHIFT columns into one has its first
    tile begin at column -COLUMN_SHIFT.
    """
    tiles_k = tl.cdiv(K + COLUMN_SHIFT, BLOCK_K)
    begin = tile // tiles_k * BLOCK_N
    tile_k = tile % tiles_k
    quads = quad_offset + tile_k * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)[:, None]
    return begin, tl.minimum(begin + BLOCK_N, N), tile_k * BLOCK_K - COLUMN_SHIFT, quads


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _sample_weight_kernel(
    sampled_ptr,  # (N, K), or None: only the KL is wanted
    sampled_bias_ptr,  # (N,), or None
    kl,  # a `Total` with a part for each program, or None
    weight,  # a `Gaussian` (N, K)
    bias,  # a `Gaussian` (N,), perhaps of None
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    N,
    K,
    row_offset,
    quad_offset,
    stream,
    bias_row,
    bias_column,
    bias_stream,
    COLUMN_SHIFT: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,  # 4 divides K, and COLUMN_SHIFT is 0
    EVEN: tl.constexpr,  # BLOCK_K divides K, and COLUMN_SHIFT is 0
    ESTIMATOR: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W = mu + softplus(rho) eps, likewise the bias, and the sum of their KL.

    In place of W what the second product of other estimators takes: "local" sigma^2, of the bias too; "flipout" sigma
    eps.

    Grid: (cdiv(N, BLOCK_N) * cdiv(K + COLUMN_SHIFT, BLOCK_K) + (cdiv(N, BIAS_BLOCK) if there is a bias),).
    """
    if WHOLE_QUADS:
        K = K // 4 * 4  # for the compiler to see
    tile, tiles = tl.program_id(0), tl.cdiv(N, BLOCK_N) * tl.cdiv(K + COLUMN_SHIFT, BLOCK_K)
    WITH_KL: tl.constexpr = kl is not None
    kl_part = 0.0
    if sampled_ptr is not None:
        seed, sample = load_key(seed_ptr, sample_ptr)
    if tile < tiles:
        begin, end, column, quads = row_tile(tile, N, K, quad_offset, COLUMN_SHIFT, BLOCK_N, BLOCK_K)
        columns, exist = quad_columns(column, K, COLUMN_SHIFT, WHOLE_QUADS, EVEN, BLOCK_K)
        start = begin.to(tl.int64) * K + column
        mu_row, rho_row = weight.mu + start, weight.rho + start
        if sampled_ptr is not None:
            sampled_row = sampled_ptr + start
        if WITH_KL:
            prior_mu, prior_sigma = open_prior(weight, start)
            centres = kl_centres(prior_sigma)
            logarithms = tl.zeros((BLOCK_K // 4, 1), tl.float32)
            squares = logarithms
        for row in range(begin, end):
            mu = load_quads(mu_row, columns, exist, 0.0, WHOLE_QUADS)
            sigma = sigma_from_rho(load_quads(rho_row, columns, exist, 0.0, WHOLE_QUADS))
            if sampled_ptr is not None:
                if ESTIMATOR == "local":
                    sampled = sigma * sigma
                else:
                    sampled = sigma * normal_quads(seed, quads, row_offset + row, sample, stream)
                    if ESTIMATOR == "shared":
                        sampled += mu
                store_quads(sampled_row, columns, sampled, exist, WHOLE_QUADS)
                sampled_row += K
            if WITH_KL:
                m0, s0 = prior_mu, prior_sigma
                if not weight.PRIOR_MU_SCALAR:
                    m0 = load_quads(prior_mu, columns, exist, 0.0, WHOLE_QUADS)
                    prior_mu += K
                if not weight.PRIOR_SIGMA_SCALAR:
                    s0 = load_quads(prior_sigma, columns, exist, 1.0, WHOLE_QUADS)
                    prior_sigma += K
                logarithm, scale, shift = kl_terms(mu, sigma, m0, s0)
                if WHOLE_QUADS:
                    logarithms += sum_quads(logarithm) - 4.0 * centres[0]
                    squares += sum_squares_of_quads(scale, shift, -4.0 * centres[1])
                else:
                    logarithms += sum_quads(tl.where(exist, logarithm - centres[0], 0.0))
                    square = scale * scale + shift * shift - centres[1]
                    squares += sum_quads(tl.where(exist, square, 0.0))
            mu_row += K
            rho_row += K
        if WITH_KL:
            if WHOLE_QUADS and not EVEN:
                quad_exists = column + 4 * tl.arange(0, BLOCK_K // 4)[:, None] < K
                logarithms, squares = tl.where(quad_exists, logarithms, 0.0), tl.where(quad_exists, squares, 0.0)
            kl_part = kl_from_sums(tl.sum(logarithms), tl.sum(squares), centres)
    elif sampled_bias_ptr is not None:
        outputs = (tile - tiles) * BIAS_BLOCK + tl.arange(0, BIAS_BLOCK)
        noise = Noise(seed, bias_row, tl.cast(bias_column, tl.int64) + outputs, sample, bias_stream)
        mu, sigma, kl_part = bias_moments(bias, outputs, N, WITH_KL)
        if ESTIMATOR == "local":
            b = sigma * sigma
        else:
            b = mu + sigma * normal_vector(*noise)
        tl.store(sampled_bias_ptr + outputs, b.to(sampled_bias_ptr.dtype.element_ty), mask=outputs < N)
    if WITH_KL:
        sum_in_order(kl, kl_part, tile, tl.num_programs(0))


def _column_shift(shape: torch.Size, address: Sequence[int]) -> int:
    """Columns of its first quad that a shard leaves out; without columns there are no tiles that it could shift."""
    return address[2] % 4 if shape[1] > 0 else 0


def constants(shape: torch.Size, address: Sequence[int], config: TileConfig) -> dict[str, Any]:
    """Those of kernels with a bias that follow from sizes."""
    return {"BIAS_BLOCK": BIAS_BLOCK, **tile_constants(shape, address, config)}


def tile_constants(shape: torch.Size, address: Sequence[int], config: TileConfig) -> dict[str, Any]:
    """Those of all kernels over tiles of rows."""
    shift = _column_shift(shape, address)
    return {
        "COLUMN_SHIFT": shift,
        "WHOLE_QUADS": shift == 0 and shape[1] % 4 == 0,
        "EVEN": shift == 0 and shape[1] % config.block_k == 0,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
    }


def programs_of(shape: torch.Size, address: Sequence[int], config: TileConfig, with_bias: bool) -> int:
    rows, columns = shape
    tiles = triton.cdiv(rows, config.block_n) * triton.cdiv(columns + _column_shift(shape, address), config.block_k)
    return tiles + (triton.cdiv(rows, BIAS_BLOCK) if with_bias else 0)


def sample_layer(
    weight: Parameter,
    bias: Sequence[Tensor | None],
    key: tuple[Tensor | None, Tensor | None],
    addresses: tuple[Sequence[int], Sequence[int]],
    dtype: torch.dtype | None,
    with_kl: bool,
    estimator: str = "shared",
    config: TileConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """W, b and the sum of their KL, in one launch.

    Args:
        weight, bias: mu, rho, prior_mu, prior_sigma; four times None without a bias.
        key: the seed, and the Monte Carlo sample.
        addresses: of the weight's noise and of the bias's.
        dtype: of W and b; None if only the KL is wanted.
        with_kl: otherwise the KL has no element.
        estimator: which W is for; see `_sample_weight_kernel`.
    """
    mu, bias_mu = weight[0], bias[0]
    config = config or select_tile_config(mu.shape)
    programs = programs_of(mu.shape, addresses[0], config, bias_mu is not None)
    sampled = None if dtype is None else mu.new_empty(mu.shape, dtype=dtype)
    sampled_bias = None if dtype is None or bias_mu is None else mu.new_empty(bias_mu.shape, dtype=dtype)
    if programs == 0:
        return sampled, sampled_bias, mu.new_zeros(() if with_kl else 0, dtype=torch.float32)
    kl = new_total(mu, programs) if with_kl else None
    stream, row_offset, column_offset = addresses[0]
    _sample_weight_kernel[(programs,)](
        sampled,
        sampled_bias,
        kl,
        gaussian(weight),
        gaussian(bias),
        *key,
        *mu.shape,
        row_offset,
        column_offset // 4,
        stream,
        *bias_noise(addresses[1]),
        ESTIMATOR=estimator,
        **constants(mu.shape, addresses[0], config),
    )
    return sampled, sampled_bias, value_of(kl, mu)


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
    parameter = (mu, rho, prior_mu, prior_sigma)
    weight, _, kl = sample_layer(parameter, NO_BIAS, (seed, sample), (address, address), dtype, with_kl, config=config)
    assert weight is not None
    return weight, kl


def weight_kl(
    mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor, config: TileConfig | None = None
) -> Tensor:
    """The KL alone; see the operator of this name."""
    address = (0, 0, 0)
    parameter = (mu, rho, prior_mu, prior_sigma)
    return sample_layer(parameter, NO_BIAS, (None, None), (address, address), None, True, config=config)[-1]

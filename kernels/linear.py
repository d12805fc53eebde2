"""y = x W^T + b with W drawn inside the product: one pass over (mu, rho) gives the output and the KL."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.bias import sample_bias
from fusedbayes.kernels.config import MatmulConfig, fits
from fusedbayes.kernels.gaussian import sigma_from_rho
from fusedbayes.kernels.launch import (
    NOT_SPECIALIZED,
    Parameter,
    allow_tf32,
    bias_noise,
    capability,
    dot_options,
    whole_quads,
    with_near_rows,
)
from fusedbayes.kernels.noise import Noise, load_key, normal_tile
from fusedbayes.kernels.parameter import gaussian, load_elements
from fusedbayes.kernels.sample import sample_layer
from fusedbayes.kernels.select import select_config
from fusedbayes.kernels.sums import new_total, partial_results, reduce, sum_in_order, value_of
from fusedbayes.kernels.tile_kl import add_kl, open_charge, total_kl


class _Tiles(NamedTuple):
    """What the steps of a program share.

    Attributes:
        x_ptr, mu_ptr, rho_ptr: at the program's first row; x_offsets (BLOCK_K, BLOCK_M), weight_offsets (BLOCK_N,
            BLOCK_K): of the first tile of columns.
        noise: of the first tile of columns.
        charge: of `open_charge`, or None without KL.
    """

    x_ptr: Any
    x_offsets: Any
    stride_xk: Any
    mu_ptr: Any
    rho_ptr: Any
    weight_offsets: Any
    noise: Any
    charge: Any
    K: Any


@triton.jit
def _step(y, kl_sums, tile_k, tiles, MASKED: tl.constexpr, DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """One tile of columns: draw W, multiply, add to y (BLOCK_N, BLOCK_M) and to the sums of the KL."""
    BLOCK_K: tl.constexpr = tiles.weight_offsets.shape[1]
    noise = tiles.noise
    first = tile_k * BLOCK_K
    # A 32-bit sum per four weights and a wide multiply-add per address: cheaper than 64-bit offsets.
    offsets = tiles.weight_offsets + first
    exist, x_exist, quads_exist = None, None, None
    if MASKED:
        columns = first + tl.arange(0, BLOCK_K)
        exist, x_exist = (columns < tiles.K)[None, :], (columns < tiles.K)[:, None]
        quads_exist = (first + 4 * tl.arange(0, BLOCK_K // 4) < tiles.K)[None, :]
    mu = load_elements(tiles.mu_ptr, offsets, exist, 0.0).to(tl.float32)
    sigma = sigma_from_rho(load_elements(tiles.rho_ptr, offsets, exist, 0.0).to(tl.float32))
    x = load_elements(tiles.x_ptr + tl.cast(first, tl.int64) * tiles.stride_xk, tiles.x_offsets, x_exist, 0.0)
    quads = noise.columns + tile_k * (BLOCK_K // 4)
    weight = mu + sigma * normal_tile(noise.seed, noise.rows, quads, noise.sample, noise.stream)
    y = tl.dot(weight.to(x.dtype).to(DOT_DTYPE), x.to(DOT_DTYPE), y, input_precision=INPUT_PRECISION)
    if tiles.charge is not None:
        kl_sums = add_kl(kl_sums, tiles.charge, mu, sigma, offsets, exist, quads_exist)
    return y, kl_sums


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_forward_kernel(
    y_ptr,  # (M, N) row-major, or (splits, M, N) fp32 partial results
    kl,  # a `Total` of splits * cdiv(N, BLOCK_N) parts, or None
    x_ptr,  # (M, K)
    weight,  # a `Gaussian` (N, K)
    bias,  # a `Gaussian` (N,), perhaps of None
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
    bias_row,
    bias_column,
    bias_stream,
    tiles_per_split,
    EVEN_N: tl.constexpr,  # BLOCK_N divides N
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    X_QUADS: tl.constexpr,  # x has whole quads of adjacent columns
    KL_ROWS: tl.constexpr,  # that the threads cover at once: a thread adds up the rows that it has
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y^T = W x^T + b over a split of the columns, the sampled tile on the tensor cores' M side.

    Grid: (cdiv(N, BLOCK_N), splits, cdiv(M, BLOCK_M)). Every tile of batch rows draws the same W; the first one's KL
    counts, and the first split adds the bias. 4 divides K and the shard's first column.
    """
    K = K // 4 * 4  # for the compiler to see
    if X_QUADS:
        stride_xm = stride_xm // 4 * 4
    tile_n, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row, first_batch = tile_n * BLOCK_N, tile_m * BLOCK_M
    rows, batch = first_row + tl.arange(0, BLOCK_N), first_batch + tl.arange(0, BLOCK_M)
    # Rows that stick out repeat the last one: drawn, multiplied and not stored, so that no load needs a mask for them.
    weight_offsets = (tl.minimum(rows, N - 1) - first_row)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    x_offsets = (tl.minimum(batch, M - 1) - first_batch)[None, :] * stride_xm
    x_offsets += tl.arange(0, BLOCK_K)[:, None] * stride_xk
    x_ptr += first_batch.to(tl.int64) * stride_xm
    start = first_row.to(tl.int64) * K
    seed, sample = load_key(seed_ptr, sample_ptr)
    noise = Noise(seed, row_offset + rows, quad_offset + tl.arange(0, BLOCK_K // 4), sample, stream)
    charge = None
    if kl is not None:
        exist = (rows < N)[:, None]
        if EVEN_N:
            exist = tl.full((BLOCK_N, 1), True, tl.int1)  # folded
        charge = open_charge(weight, start, exist, KL_ROWS)
    tiles = _Tiles(x_ptr, x_offsets, stride_xk, weight.mu + start, weight.rho + start, weight_offsets, noise, charge, K)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(K, BLOCK_K))
    full_end = tl.minimum(end_tile, K // BLOCK_K)

    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    nothing = tl.zeros((KL_ROWS, BLOCK_K // 4), tl.float32)
    kl_sums = nothing, nothing
    for tile_k in tl.range(first_tile, full_end, loop_unroll_factor=UNROLL):
        y, kl_sums = _step(y, kl_sums, tile_k, tiles, False, DOT_DTYPE, INPUT_PRECISION)
    if not EVEN_K:
        if full_end < end_tile:
            y, kl_sums = _step(y, kl_sums, full_end, tiles, True, DOT_DTYPE, INPUT_PRECISION)

    kl_part = 0.0
    if kl is not None:
        kl_part = total_kl(kl_sums, charge)
    if bias.mu is not None:
        if split == 0:
            bias_columns = tl.cast(bias_column, tl.int64) + rows
            b, bias_kl = sample_bias(
                bias, Noise(seed, bias_row, bias_columns, sample, bias_stream), rows, N, kl is not None
            )
            y += b.to(x_ptr.dtype.element_ty).to(tl.float32)[:, None]
            kl_part += bias_kl
    # 32-bit offsets within the tile: of a large one, 64-bit addresses would not fit the registers.
    y_ptr += (split.to(tl.int64) * M + first_batch) * N + first_row
    y_offsets = tl.arange(0, BLOCK_M)[None, :] * N + tl.arange(0, BLOCK_N)[:, None]
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (batch < M)[None, :])
    if kl is not None:
        if tile_m == 0:
            sum_in_order(kl, kl_part, split * tl.num_programs(0) + tile_n, tl.num_programs(0) * tl.num_programs(1))


def _single_pass(
    x: Tensor,
    weight: Parameter,
    bias: Sequence[Tensor | None],
    key: tuple[Tensor, Tensor | None],
    addresses: tuple[Sequence[int], Sequence[int]],
    with_kl: bool,
    config: MatmulConfig,
) -> tuple[Tensor, Tensor]:
    (M, K), N = x.shape, weight[0].shape[0]
    x = with_near_rows(x, max(config.block_m, config.block_k))
    stream, row_offset, column_offset = addresses[0]
    tiles_n, tiles_k = triton.cdiv(N, config.block_n), triton.cdiv(K, config.block_k)
    tiles_per_split = triton.cdiv(tiles_k, config.splits)
    splits = triton.cdiv(tiles_k, tiles_per_split)
    y = x.new_empty((M, N))
    partial_y = partial_results(y, splits)
    kl = new_total(x, splits * tiles_n) if with_kl else None
    _linear_forward_kernel[(tiles_n, splits, triton.cdiv(M, config.block_m))](
        partial_y,
        kl,
        x,
        gaussian(weight),
        gaussian(bias),
        *key,
        M,
        N,
        K,
        *x.stride(),
        row_offset,
        column_offset // 4,
        stream,
        *bias_noise(addresses[1]),
        tiles_per_split,
        EVEN_N=N % config.block_n == 0,
        EVEN_K=K % config.block_k == 0,
        X_QUADS=whole_quads(x.stride()),
        KL_ROWS=min(config.block_n, max(1, 4 * 32 * config.num_warps // config.block_k)),
        **dot_options(x),
        UNROLL=config.unroll,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return reduce(y, partial_y, splits), value_of(kl, x)


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
    config = config or select_config("forward", shape, x.dtype, capability(x), allow_tf32())
    weight = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    key, addresses = (seed, sample), (weight_address, bias_address)
    if config.single_pass and fits("forward", config, shape) and weight_address[2] % 4 == 0:
        return _single_pass(x, weight, bias, key, addresses, with_kl, config)
    sampled, sampled_bias, kl = sample_layer(weight, bias, key, addresses, x.dtype, with_kl)
    assert sampled is not None
    y = x @ sampled.t() if sampled_bias is None else torch.addmm(sampled_bias, x, sampled.t())
    return y, kl

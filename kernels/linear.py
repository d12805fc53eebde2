"""y = x W^T + b with W drawn inside the product: one pass over (mu, rho) gives the output and the KL."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.bias import sample_bias
from fusedbayes.kernels.config import MatmulConfig, fits
from fusedbayes.kernels.gaussian import kl_centres, kl_from_sums, kl_terms, sigma_from_rho
from fusedbayes.kernels.launch import (
    NOT_SPECIALIZED,
    Parameter,
    allow_tf32,
    bias_noise,
    capability,
    dot_options,
    pointers,
    scalar_priors,
    whole_quads,
    with_near_rows,
)
from fusedbayes.kernels.noise import load_key, normal_tile
from fusedbayes.kernels.sample import sample_layer
from fusedbayes.kernels.select import select_config
from fusedbayes.kernels.sums import (
    arrival_counter,
    partial_results,
    reduce,
    sum_in_order,
    sum_quads,
    sum_rows,
    sum_squares_of_quads,
)


@triton.jit
def _load(ptr, offsets, exist, MASKED: tl.constexpr, other: tl.constexpr):
    if MASKED:
        tile = tl.load(ptr + offsets, mask=exist, other=other)
    else:
        tile = tl.load(ptr + offsets)
    return tile


@triton.jit
def _step(
    sums,  # y (BLOCK_N, BLOCK_M); logarithms and squares (KL_ROWS, BLOCK_K // 4)
    tile_k,
    tensors,  # pointers to x, mu, rho and both priors, at this program's rows
    x_offsets,
    weight_offsets,
    prior,  # its mean and deviation, where they are numbers
    centres,  # of the KL's terms
    noise,  # seed, rows, quads of tile 0, sample, stream
    K,
    stride_xk,
    MASKED: tl.constexpr,
    WITH_KL: tl.constexpr,
    PRIOR_MU_SCALAR: tl.constexpr,
    PRIOR_SIGMA_SCALAR: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of columns: draw W, multiply, add to the sums that the KL is made of."""
    y, logarithms, squares = sums
    x_ptr, mu_ptr, rho_ptr, prior_mu_ptr, prior_sigma_ptr = tensors
    seed, rows, quads, sample, stream = noise
    first = tile_k * BLOCK_K
    # A 32-bit sum per four weights and a wide multiply-add per address: cheaper than 64-bit offsets.
    offsets = weight_offsets + first
    exist = (first + tl.arange(0, BLOCK_K) < K)[None, :]
    mu = _load(mu_ptr, offsets, exist, MASKED, 0.0).to(tl.float32)
    sigma = sigma_from_rho(_load(rho_ptr, offsets, exist, MASKED, 0.0).to(tl.float32))
    x = _load(x_ptr + tl.cast(first, tl.int64) * stride_xk, x_offsets, tl.trans(exist), MASKED, 0.0)
    eps = normal_tile(seed, rows, quads + tile_k * (BLOCK_K // 4), sample, stream)
    weight = (mu + sigma * eps).to(x.dtype)
    y = tl.dot(weight.to(DOT_DTYPE), x.to(DOT_DTYPE), y, input_precision=INPUT_PRECISION)
    if WITH_KL:
        prior_mu, prior_sigma = prior
        if not PRIOR_MU_SCALAR:
            prior_mu = _load(prior_mu_ptr, offsets, exist, MASKED, 0.0).to(tl.float32)
        if not PRIOR_SIGMA_SCALAR:
            prior_sigma = _load(prior_sigma_ptr, offsets, exist, MASKED, 1.0).to(tl.float32)
        logarithm, scale, shift = kl_terms(mu, sigma, prior_mu, prior_sigma, PRIOR_SIGMA_SCALAR)
        logarithm = sum_rows(sum_quads(logarithm), logarithms.shape[0])
        square = sum_rows(sum_squares_of_quads(scale, shift, -4.0 * centres[1]), squares.shape[0])
        added: tl.constexpr = 4 * weight_offsets.shape[0] // logarithms.shape[0]  # logarithms in each sum
        logarithm -= added * centres[0]
        if MASKED:
            quads_exist = (first + 4 * tl.arange(0, BLOCK_K // 4) < K)[None, :]
            logarithm, square = tl.where(quads_exist, logarithm, 0.0), tl.where(quads_exist, square, 0.0)
        logarithms += logarithm
        squares += square
    return y, logarithms, squares


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_forward_kernel(
    y_ptr,  # (M, N) row-major, or (splits, M, N) fp32 partial results
    kl_ptr,  # () fp32, or None
    partial_ptr,  # (splits * cdiv(N, BLOCK_N),) fp32, or None
    counter_ptr,  # () int32, zero, or None
    x_ptr,  # (M, K)
    mu_ptr,  # (N, K) row-major
    rho_ptr,  # (N, K) row-major
    prior_mu_ptr,  # () or (N, K) row-major
    prior_sigma_ptr,  # () or (N, K) row-major
    bias_mu_ptr,  # (N,), or None
    bias_rho_ptr,  # (N,), or None
    bias_prior_mu_ptr,  # () or (N,), or None
    bias_prior_sigma_ptr,  # () or (N,), or None
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
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    X_QUADS: tl.constexpr,  # x has whole quads of adjacent columns
    PRIOR_MU_SCALAR: tl.constexpr,
    PRIOR_SIGMA_SCALAR: tl.constexpr,
    BIAS_PRIOR_MU_SCALAR: tl.constexpr,
    BIAS_PRIOR_SIGMA_SCALAR: tl.constexpr,
    KL_ROWS: tl.constexpr,  # BLOCK_N, or less where it divides N: see `sum_rows`
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
    rows = first_row + tl.arange(0, BLOCK_N)
    batch = first_batch + tl.arange(0, BLOCK_M)
    # Rows that stick out repeat the last one: drawn, multiplied and not stored, so that no load needs a mask for them.
    weight_offsets = (tl.minimum(rows, N - 1) - first_row)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    x_offsets = (tl.minimum(batch, M - 1) - first_batch)[None, :] * stride_xm
    x_offsets += tl.arange(0, BLOCK_K)[:, None] * stride_xk
    tile_start = first_row.to(tl.int64) * K
    mu_ptr += tile_start
    rho_ptr += tile_start
    x_ptr += first_batch.to(tl.int64) * stride_xm
    seed, sample = load_key(seed_ptr, sample_ptr)
    prior = 0.0, 1.0
    centres = 0.0, 1.0
    if kl_ptr is not None:
        prior = tl.load(prior_mu_ptr).to(tl.float32), tl.load(prior_sigma_ptr).to(tl.float32)
        centres = kl_centres(prior[1], PRIOR_SIGMA_SCALAR)
        if not PRIOR_MU_SCALAR:
            prior_mu_ptr += tile_start
        if not PRIOR_SIGMA_SCALAR:
            prior_sigma_ptr += tile_start
    tensors = (x_ptr, mu_ptr, rho_ptr, prior_mu_ptr, prior_sigma_ptr)
    noise = (seed, row_offset + rows, quad_offset + tl.arange(0, BLOCK_K // 4), sample, stream)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(K, BLOCK_K))
    full_end = tl.minimum(end_tile, K // BLOCK_K)

    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    logarithms = tl.zeros((KL_ROWS, BLOCK_K // 4), tl.float32)
    squares = logarithms
    for tile_k in tl.range(first_tile, full_end, loop_unroll_factor=UNROLL):
        y, logarithms, squares = _step(
            (y, logarithms, squares),
            tile_k,
            tensors,
            x_offsets,
            weight_offsets,
            prior,
            centres,
            noise,
            K,
            stride_xk,
            False,
            kl_ptr is not None,
            PRIOR_MU_SCALAR,
            PRIOR_SIGMA_SCALAR,
            DOT_DTYPE,
            INPUT_PRECISION,
            BLOCK_K,
        )
    if not EVEN_K:
        if full_end < end_tile:
            y, logarithms, squares = _step(
                (y, logarithms, squares),
                full_end,
                tensors,
                x_offsets,
                weight_offsets,
                prior,
                centres,
                noise,
                K,
                stride_xk,
                True,
                kl_ptr is not None,
                PRIOR_MU_SCALAR,
                PRIOR_SIGMA_SCALAR,
                DOT_DTYPE,
                INPUT_PRECISION,
                BLOCK_K,
            )

    kl = 0.0
    if kl_ptr is not None:
        if KL_ROWS == BLOCK_N:
            logarithms = tl.where(rows[:, None] < N, logarithms, 0.0)
            squares = tl.where(rows[:, None] < N, squares, 0.0)
        kl = kl_from_sums(tl.sum(logarithms), tl.sum(squares), centres)
    if bias_mu_ptr is not None:
        if split == 0:
            bias, bias_kl = sample_bias(
                bias_mu_ptr,
                bias_rho_ptr,
                bias_prior_mu_ptr,
                bias_prior_sigma_ptr,
                rows,
                N,
                seed,
                sample,
                bias_row,
                bias_column,
                bias_stream,
                kl_ptr is not None,
                BIAS_PRIOR_MU_SCALAR,
                BIAS_PRIOR_SIGMA_SCALAR,
            )
            y += bias.to(x_ptr.dtype.element_ty).to(tl.float32)[:, None]
            kl += bias_kl
    tl.store(
        y_ptr + (split.to(tl.int64) * M + batch.to(tl.int64))[None, :] * N + rows[:, None],
        y.to(y_ptr.dtype.element_ty),
        mask=(rows[:, None] < N) & (batch[None, :] < M),
    )
    if kl_ptr is not None:
        if tile_m == 0:
            part = split * tl.num_programs(0) + tile_n
            sum_in_order(kl_ptr, partial_ptr, counter_ptr, kl, part, tl.num_programs(0) * tl.num_programs(1))


def _kl_rows(outputs: int, config: MatmulConfig) -> int:
    """Rows of the tile that one pass of the threads covers, if no tile sticks out; else all of them."""
    covered = max(1, 32 * config.num_warps * 4 // config.block_k)
    return config.block_n if outputs % config.block_n or covered > config.block_n else covered


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
    kl = x.new_empty(() if with_kl else 0, dtype=torch.float32)
    _linear_forward_kernel[(tiles_n, splits, triton.cdiv(M, config.block_m))](
        partial_y,
        kl if with_kl else None,
        x.new_empty(splits * tiles_n, dtype=torch.float32) if with_kl else None,
        arrival_counter(x) if with_kl else None,
        x,
        *pointers(weight),
        *pointers(bias),
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
        EVEN_K=K % config.block_k == 0,
        X_QUADS=whole_quads(x.stride()),
        **scalar_priors(weight),
        **scalar_priors(bias, "BIAS_"),
        KL_ROWS=_kl_rows(N, config),
        **dot_options(x),
        UNROLL=config.unroll,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return reduce(y, partial_y, splits), kl


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

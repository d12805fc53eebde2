"""y = x W^T + b with W drawn inside the product: one pass over (mu, rho) gives the output and the KL."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.bias import bias_term
from fusedbayes.kernels.combine import combine
from fusedbayes.kernels.config import MatmulConfig, fits
from fusedbayes.kernels.fragments import block_columns, fragment_columns, fragment_rows, in_fragments
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
from fusedbayes.kernels.linear_step import Tiles, step, x_first
from fusedbayes.kernels.linear_two_passes import linear_in_two_passes
from fusedbayes.kernels.noise import Noise, load_key
from fusedbayes.kernels.parameter import gaussian
from fusedbayes.kernels.select import select_config
from fusedbayes.kernels.sums import add_parts, arrive_last, new_splits, new_total, store_part, sum_in_order, value_of
from fusedbayes.kernels.tile_kl import open_charge, total_kl


@triton.jit
def _store_tile(y_ptr, y, rows, batch, M, N, EVEN_N: tl.constexpr):
    """Stores y^T (BLOCK_N, BLOCK_M) in (M, N), from its first element on."""
    in_bounds = (batch < M)[None, :]
    if not EVEN_N:
        in_bounds = in_bounds & (rows < N)[:, None]
    # 32-bit offsets within the tile: of a large one, 64-bit addresses would not fit the registers.
    offsets = tl.arange(0, y.shape[1])[None, :] * N + tl.arange(0, y.shape[0])[:, None]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=in_bounds)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_forward_kernel(
    y_ptr,  # (num_samples, M, N) row-major; of a pair of products (splits, 2, num_samples, M, N) fp32
    splits,  # `Splits` of y; None if there is one alone, or a pair of products
    kl,  # a `Total` of splits * cdiv(N, BLOCK_N) parts, or None
    x_ptr,  # (num_samples, M, K)
    weight,  # a `Gaussian` (N, K)
    bias,  # a `Gaussian` (N,), perhaps of None
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    num_samples,
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
    SAME_INPUT: tl.constexpr,  # x is (M, K), one batch for all samples
    IN_FRAGMENTS: tl.constexpr,  # weights are drawn in the order of the product's operand
    X_FIRST: tl.constexpr,  # x W^T in the place of W x^T
    KL_ROWS: tl.constexpr,  # that the threads cover at once: a thread adds up the rows that it has
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    UNROLL: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x W^T + b over a split of the columns, as it stands with X_FIRST, else transposed: y^T = W x^T + b.

    The operand that comes first, the batch or the sampled tile, is on the tensor cores' M side. Each of SAMPLES Monte
    Carlo samples draws its W from one mu and sigma, for its own batch of M rows. Of the other estimators it is the pair
    of products, with the bias, that `combine` makes y of; see `step`.

    Grid: (cdiv(num_samples, SAMPLES) * cdiv(N, BLOCK_N), splits, cdiv(M, BLOCK_M)). Every tile of batch rows draws the
    same W; the first one's KL counts, and the first split adds the bias. 4 divides K and the shard's first column.
    Programs that differ in their samples alone are neighbours: what one reads the others find in the cache.
    """
    K = K // 4 * 4  # for the compiler to see
    if X_QUADS:
        stride_xm = stride_xm // 4 * 4
    groups = tl.cdiv(num_samples, SAMPLES)
    tile_n, split, tile_m = tl.program_id(0) // groups, tl.program_id(1), tl.program_id(2)
    first_sample = (tl.program_id(0) % groups).to(tl.int64) * SAMPLES
    first_row, first_batch = tile_n * BLOCK_N, tile_m * BLOCK_M
    rows, batch = first_row + tl.arange(0, BLOCK_N), first_batch + tl.arange(0, BLOCK_M)
    # Rows that stick out repeat the last one: drawn, multiplied and not stored, so that no load needs a mask for them.
    drawn, columns = rows, tl.arange(0, BLOCK_K)
    if IN_FRAGMENTS:
        drawn, columns = first_row + fragment_rows(BLOCK_N), fragment_columns(BLOCK_K)
    row_offsets = (tl.minimum(drawn, N - 1) - first_row) * K
    if IN_FRAGMENTS:
        weight_offsets = row_offsets[None, :, None] + block_columns(BLOCK_K)
    else:
        weight_offsets = row_offsets[:, None] + columns[None, :]
    x_ptr += first_batch.to(tl.int64) * stride_xm
    start = first_row.to(tl.int64) * K
    x_rows, mu_ptr, rho_ptr = x_ptr, weight.mu + start, weight.rho + start
    batch_offsets = (tl.minimum(batch, M - 1) - first_batch) * stride_xm
    if X_FIRST:
        # Pointers to rows, which stay: of each row one instruction in a step, where there are many of them.
        x_rows, x_offsets = x_ptr + batch_offsets[:, None], columns[None, :] * stride_xk
        mu_ptr, rho_ptr = mu_ptr + row_offsets[:, None], rho_ptr + row_offsets[:, None]
    else:
        x_offsets = batch_offsets[None, :] + columns[:, None] * stride_xk
    seed, sample = load_key(seed_ptr, sample_ptr)
    noise = Noise(seed, row_offset + drawn, quad_offset + tl.arange(0, BLOCK_K // 4), sample, stream)
    charge = None
    if kl is not None:
        exist = (drawn < N)[:, None]
        if EVEN_N:
            exist = tl.full((BLOCK_N, 1), True, tl.int1)  # folded
        charge = open_charge(weight, start, exist, KL_ROWS)
    stride_xs = tl.zeros((), tl.int64) if SAME_INPUT else stride_xm.to(tl.int64) * M
    tiles = Tiles(
        x_rows,
        x_offsets,
        stride_xk,
        stride_xs,
        first_sample,
        num_samples - 1,
        mu_ptr,
        rho_ptr,
        weight_offsets,
        noise,
        batch,
        tl.cast(quad_offset, tl.int64),
        charge,
        K,
    )
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(K, BLOCK_K))
    full_end = tl.minimum(end_tile, K // BLOCK_K)

    PRODUCTS: tl.constexpr = SAMPLES if ESTIMATOR == "shared" else 2
    products = ()
    for _ in tl.static_range(PRODUCTS):
        if X_FIRST:
            products += (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
        else:
            products += (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),)
    nothing = tl.zeros((KL_ROWS, BLOCK_K // 4), tl.float32)
    kl_sums = nothing, nothing
    for tile_k in tl.range(first_tile, full_end, loop_unroll_factor=UNROLL):
        products, kl_sums = step(products, kl_sums, tile_k, tiles, False, ESTIMATOR, DOT_DTYPE, INPUT_PRECISION)
    if not EVEN_K:
        if full_end < end_tile:
            products, kl_sums = step(products, kl_sums, full_end, tiles, True, ESTIMATOR, DOT_DTYPE, INPUT_PRECISION)

    kl_part = 0.0
    if kl is not None:
        kl_part = total_kl(kl_sums, charge)
    tile, tiles = tile_m * tl.num_programs(0) + tl.program_id(0), tl.num_programs(0) * tl.num_programs(2)
    sums, starts = (), ()
    for i in tl.static_range(PRODUCTS):
        product, index, plane = products[i], first_sample, (split.to(tl.int64) * PRODUCTS + i) * num_samples
        if X_FIRST:
            product = tl.trans(product)
        if ESTIMATOR == "shared":
            index, plane = tl.minimum(first_sample + i, num_samples - 1), 0
        if bias.mu is not None:
            if split == 0:
                bias_columns = tl.cast(bias_column, tl.int64) + rows
                bias_noise = Noise(seed, bias_row, bias_columns, sample + index, bias_stream)
                b, bias_kl = bias_term(bias, bias_noise, rows, N, i, ESTIMATOR, x_ptr.dtype.element_ty, kl is not None)
                product += b[:, None]
                if i == 0:
                    kl_part += bias_kl
        start = ((plane + index) * M + first_batch) * N + first_row
        if splits is None:
            _store_tile(y_ptr + start, product, rows, batch, M, N, EVEN_N)
        else:
            store_part(product, splits, split, tile * PRODUCTS + i, tiles * PRODUCTS)
            sums += (product,)
            starts += (start,)
    if splits is not None:
        if arrive_last(splits.counters + 1 + tile, tl.num_programs(1)):
            for i in tl.static_range(PRODUCTS):
                y = add_parts(sums[i], splits, split, tl.num_programs(1), tile * PRODUCTS + i, tiles * PRODUCTS)
                _store_tile(y_ptr + starts[i], y, rows, batch, M, N, EVEN_N)
    if kl is not None:
        if (tile_m == 0) & (first_sample == 0):
            tiles_n = tl.cdiv(N, BLOCK_N)
            sum_in_order(kl, kl_part, split * tiles_n + tile_n, tiles_n * tl.num_programs(1))


def _single_pass(
    x: Tensor,
    weight: Parameter,
    bias: Sequence[Tensor | None],
    key: tuple[Tensor, Tensor | None],
    addresses: tuple[Sequence[int], Sequence[int]],
    num_samples: int,
    same_input: bool,
    estimator: str,
    with_kl: bool,
    config: MatmulConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    N, K = weight[0].shape
    rows = num_samples * x.shape[0] if same_input else x.shape[0]
    # Without noise of the weights all samples are one batch, or their products those of the one that they share.
    batches, products = (1, x.shape[0]) if estimator == "local" else (num_samples, rows)
    M, pair = products // batches, estimator != "shared"
    samples = 1 if pair else config.samples
    fragments, first = in_fragments(config, samples, x), x_first(config, estimator, x)
    # Where a step's first column is added to offsets, these reach all columns.
    x = with_near_rows(x, config.block_m, K if fragments or first else config.block_k)
    stream, row_offset, column_offset = addresses[0]
    tiles_n, tiles_k = triton.cdiv(N, config.block_n), triton.cdiv(K, config.block_k)
    tiles_per_split = triton.cdiv(tiles_k, config.splits)
    splits = triton.cdiv(tiles_k, tiles_per_split)
    # The threads of a tile have four columns each; in fragments a row has four of them.
    columns = 16 if fragments else config.block_k
    y = x.new_empty((rows, N))
    grid = triton.cdiv(batches, samples) * tiles_n, splits, triton.cdiv(M, config.block_m)
    out, adding, counters = y, None, None
    if pair:
        out = x.new_empty((splits, 2, products, N), dtype=torch.float32)
    elif splits > 1:
        tile = samples * config.block_m * config.block_n
        adding = new_splits(y, splits, grid[0] * grid[2], tile, 32 * config.num_warps)
        counters = adding.counters
    kl = new_total(x, splits * tiles_n, counters) if with_kl else None
    _linear_forward_kernel[grid](
        out,
        adding,
        kl,
        x,
        gaussian(weight),
        gaussian(bias),
        *key,
        batches,
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
        SAME_INPUT=same_input,
        IN_FRAGMENTS=fragments,
        X_FIRST=first,
        KL_ROWS=min(config.block_n, max(1, 4 * 32 * config.num_warps // columns)),
        **dot_options(x),
        ESTIMATOR=estimator,
        UNROLL=config.unroll,
        SAMPLES=samples,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if pair:
        return y, value_of(kl, x), combine(y, out[:, 0], out[:, 1], key, addresses[0], num_samples, estimator)
    return y, value_of(kl, x), x.new_empty(0, num_samples)


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
    num_samples: int,
    same_input: bool,
    estimator: str,
    with_kl: bool,
    config: MatmulConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the KL of weight and bias, and the slope; see the operator of this name."""
    one_batch = same_input or estimator == "local"
    shape = (x.shape[0] if one_batch else x.shape[0] // num_samples, *weight_mu.shape)
    batches = 1 if estimator == "local" else num_samples
    config = config or select_config("forward", shape, x.dtype, capability(x), allow_tf32(), batches, estimator)
    weight = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    key, addresses = (seed, sample), (weight_address, bias_address)
    # Flipout's signs of a tile of columns come from one block of them.
    aligned = weight_address[2] % (config.block_k if estimator == "flipout" else 4) == 0
    if config.single_pass and fits("forward", config, shape) and aligned:
        return _single_pass(x, weight, bias, key, addresses, num_samples, same_input, estimator, with_kl, config)
    return linear_in_two_passes(x, weight, bias, key, addresses, num_samples, same_input, estimator, with_kl)

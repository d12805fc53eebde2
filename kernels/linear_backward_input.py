"""dX = dY W with the forward's W drawn again inside the product, or the pair of products of another estimator."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.combine import combine_input, second_term
from fusedbayes.kernels.config import MatmulConfig, fits
from fusedbayes.kernels.gaussian import sigma_from_rho
from fusedbayes.kernels.launch import (
    NOT_SPECIALIZED,
    allow_tf32,
    capability,
    dot_options,
    whole_quads,
    with_near_rows,
)
from fusedbayes.kernels.noise import Noise, load_key, normal_tile
from fusedbayes.kernels.parameter import gaussian, load_elements
from fusedbayes.kernels.sample import NO_BIAS, sample_layer
from fusedbayes.kernels.second_operands import Operands
from fusedbayes.kernels.select import select_config
from fusedbayes.kernels.streams import batch_of, sample_after
from fusedbayes.kernels.sums import add_parts, arrive_last, new_splits, store_part


class _Tiles(NamedTuple):
    """What the steps of a program share.

    Attributes:
        grad_y_ptr, second_grad_ptr, mu_ptr, rho_ptr: at the split's first row; grad_y_offsets (BLOCK_N, BLOCK_M),
            weight_offsets (BLOCK_N, BLOCK_K): of its first tile of rows.
        noise: of the first tile of rows.
        rows_left: of the split.
    """

    grad_y_ptr: Any
    second_grad_ptr: Any
    grad_y_offsets: Any
    stride_gn: Any
    mu_ptr: Any
    rho_ptr: Any
    weight_offsets: Any
    noise: Any
    rows_left: Any
    K: Any


@triton.jit
def _dot(weight, grad_y, product, DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """Product (BLOCK_K, BLOCK_M) + weight^T grad_y, the weight rounded to the dtype of grad_y."""
    # The second operand of fp16 may be bf16.
    OPERANDS: tl.constexpr = DOT_DTYPE if tl.float32 == DOT_DTYPE else grad_y.dtype
    weight = tl.trans(weight.to(grad_y.dtype).to(OPERANDS))
    return tl.dot(weight, grad_y.to(OPERANDS), product, input_precision=INPUT_PRECISION)


@triton.jit
def _step(
    products,
    tile_n,
    tiles,
    MASKED: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The products (BLOCK_K, BLOCK_M) with one more tile of rows: of W; or of mu, and of sigma^2 or sigma eps."""
    BLOCK_N: tl.constexpr = tiles.weight_offsets.shape[0]
    noise = tiles.noise
    done = tile_n * BLOCK_N
    offsets = tiles.weight_offsets + done * tiles.K
    exist = None
    if MASKED:
        exist = (done + tl.arange(0, BLOCK_N) < tiles.rows_left)[:, None]
    mu = load_elements(tiles.mu_ptr, offsets, exist, 0.0).to(tl.float32)
    rho = load_elements(tiles.rho_ptr, offsets, exist, 0.0).to(tl.float32)
    grad_start = tl.cast(done, tl.int64) * tiles.stride_gn
    grad_y = load_elements(tiles.grad_y_ptr + grad_start, tiles.grad_y_offsets, exist, 0.0)
    sigma = sigma_from_rho(rho)
    if ESTIMATOR == "local":
        second = sigma * sigma
    else:
        second = sigma * normal_tile(noise.seed, noise.rows + done, noise.columns, noise.sample, noise.stream)
    if ESTIMATOR == "shared":
        sums = (_dot(mu + second, grad_y, products[0], DOT_DTYPE, INPUT_PRECISION),)
    else:
        second_grad = load_elements(tiles.second_grad_ptr + grad_start, tiles.grad_y_offsets, exist, 0.0)
        first_sum = _dot(mu, grad_y, products[0], DOT_DTYPE, INPUT_PRECISION)
        sums = (first_sum, _dot(second, second_grad, products[1], DOT_DTYPE, INPUT_PRECISION))
    return sums


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_backward_input_kernel(
    grad_x_ptr,  # (num_samples, M, K) row-major
    splits,  # `Splits` of dX, or None if there is one alone
    grad_y_ptr,  # (num_samples, M, N)
    second_grad_ptr,  # likewise, of the second product
    x_ptr,  # (num_samples, M, K) row-major, or any for "shared"
    second_x_ptr,  # likewise
    weight,  # a `Gaussian` (N, K)
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    num_samples,
    M,
    N,
    K,
    stride_gm,
    stride_gn,
    row_offset,
    quad_offset,
    stream,
    tiles_per_split,  # so many that their weights' offsets fit 32 bits
    EVEN_N: tl.constexpr,  # BLOCK_N divides N
    GRAD_QUADS: tl.constexpr,  # grad_y has whole quads of adjacent columns
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dX^T = W^T dY^T over a split of the rows, the sampled tile on the tensor cores' M side.

    Of the other estimators dX^T = mu^T dY^T + 2 x^T * ((sigma^2)^T dY'^T) or mu^T dY^T + r^T * ((sigma eps)^T dY'^T),
    with the second operands dY' and the random signs r of `second_term`. Each Monte Carlo sample has M rows.

    Grid: (num_samples * cdiv(K, BLOCK_K), splits, cdiv(M, BLOCK_M)). 4 divides K and the shard's first column. Programs
    that differ in their samples alone are neighbours: what one reads the others find in the cache.
    """
    K = K // 4 * 4  # for the compiler to see
    if GRAD_QUADS:
        stride_gm = stride_gm // 4 * 4
    tile_k, split, tile_m = tl.program_id(0) // num_samples, tl.program_id(1), tl.program_id(2)
    index = tl.program_id(0) % num_samples
    # The last tile moves left until it fits; what it shares with its neighbour both compute and write alike.
    first_column = tl.minimum(tile_k * BLOCK_K, K - BLOCK_K)
    first_row, first_batch = split * tiles_per_split * BLOCK_N, tile_m * BLOCK_M
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    batch = first_batch + tl.arange(0, BLOCK_M)
    # Batch rows that stick out repeat the last one: multiplied, and not stored.
    grad_y_offsets = (tl.minimum(batch, M - 1) - first_batch)[None, :] * stride_gm + rows[:, None] * stride_gn
    first_of_all = index.to(tl.int64) * M + first_batch
    grad_start = first_of_all * stride_gm + first_row.to(tl.int64) * stride_gn
    weight_offsets = rows[:, None] * K + columns[None, :]
    start = first_row.to(tl.int64) * K + first_column
    rows_left = tl.minimum(N - first_row, tiles_per_split * BLOCK_N)
    seed, sample = load_key(seed_ptr, sample_ptr)
    quads = quad_offset + first_column // 4 + tl.arange(0, BLOCK_K // 4)
    noise = Noise(seed, row_offset + first_row + rows, quads, sample + index, stream)
    tiles = _Tiles(
        grad_y_ptr + grad_start,
        second_grad_ptr + grad_start,
        grad_y_offsets,
        stride_gn,
        weight.mu + start,
        weight.rho + start,
        weight_offsets,
        noise,
        rows_left,
        K,
    )
    products = (tl.zeros((BLOCK_K, BLOCK_M), tl.float32),)
    if ESTIMATOR != "shared":
        products += (tl.zeros((BLOCK_K, BLOCK_M), tl.float32),)
    full = rows_left // BLOCK_N
    for tile_n in range(full):
        products = _step(products, tile_n, tiles, False, ESTIMATOR, DOT_DTYPE, INPUT_PRECISION)
    if not EVEN_N:
        if full * BLOCK_N < rows_left:
            products = _step(products, full, tiles, True, ESTIMATOR, DOT_DTYPE, INPUT_PRECISION)
    # 32-bit offsets within the tile: of a large one, 64-bit addresses would not fit the registers.
    start = first_of_all * K + first_column
    offsets = tl.arange(0, BLOCK_M)[None, :] * K + columns[:, None]
    in_bounds = (batch < M)[None, :]
    grad_x = products[0]
    if ESTIMATOR != "shared":
        x = tl.load(x_ptr + start + offsets, mask=in_bounds, other=0.0)
        second_x = tl.load(second_x_ptr + start + offsets, mask=in_bounds, other=0.0)
        grad_x += second_term(products[1], x, second_x, ESTIMATOR)
    last = True
    if splits is not None:
        tile, number = tile_m * tl.num_programs(0) + tl.program_id(0), tl.num_programs(1)
        tiles_of_x = tl.num_programs(0) * tl.num_programs(2)
        store_part(grad_x, splits, split, tile, tiles_of_x)
        last = arrive_last(splits.counters + 1 + tile, number)
        if last:
            grad_x = add_parts(grad_x, splits, split, number, tile, tiles_of_x)
    if last:
        tl.store(grad_x_ptr + start + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=in_bounds)


def _in_two_passes(
    operands: Operands,
    mu: Tensor,
    rho: Tensor,
    key: tuple[Tensor, Tensor | None],
    address: Sequence[int],
    num_samples: int,
    estimator: str,
) -> Tensor:
    """Samples what dY is multiplied with, once for each Monte Carlo sample, and has the library multiply."""
    grad_y, x, second_grad, second_x = operands
    grad_x = grad_y.new_empty((grad_y.shape[0], mu.shape[1]))
    second = grad_x
    if estimator != "shared":
        torch.mm(grad_y, mu.to(grad_y.dtype), out=grad_x)
        second = second_grad.new_empty(grad_x.shape)
    for index in range(num_samples):
        drawn = key[0], sample_after(key, index)
        parameter, addresses = (mu, rho, None, None), (address, address)
        sampled, *_ = sample_layer(parameter, NO_BIAS, drawn, addresses, second.dtype, False, estimator)
        assert sampled is not None
        torch.mm(batch_of(second_grad, index, num_samples), sampled, out=batch_of(second, index, num_samples))
    if estimator != "shared":
        combine_input(grad_x, second, x, second_x, estimator)
    return grad_x


def bayes_linear_backward_input(
    operands: Operands,
    mu: Tensor,
    rho: Tensor,
    key: tuple[Tensor, Tensor | None],
    address: Sequence[int],
    num_samples: int,
    estimator: str,
    config: MatmulConfig | None = None,
) -> Tensor:
    """dX, in one pass where that is possible.

    Args:
        key: the seed, and the first Monte Carlo sample.
        address: of the weight's noise.
        num_samples: that divide the rows; 1 for "local", which has no noise for each of them.
    """
    grad_y, x, second_grad, second_x = operands
    (rows, N), K = grad_y.shape, mu.shape[1]
    M = rows // num_samples
    stream, row_offset, column_offset = address
    options = grad_y.dtype, capability(grad_y), allow_tf32(), num_samples, estimator
    config = config or select_config("backward_input", (M, N, K), *options)
    if not (config.single_pass and fits("backward_input", config, (M, N, K)) and column_offset % 4 == 0):
        return _in_two_passes(operands, mu, rho, key, address, num_samples, estimator)
    if estimator == "shared":  # the operands of others are row-major
        grad_y = with_near_rows(grad_y, config.block_m, config.block_n)
    tiles_n = triton.cdiv(N, config.block_n)
    tiles_per_split = min(triton.cdiv(tiles_n, config.splits), 2**31 // (config.block_n * K) - 1)
    assert tiles_per_split > 0  # `fits` sees to it
    splits = triton.cdiv(tiles_n, tiles_per_split)
    grad_x = grad_y.new_empty((rows, K))
    tile = config.block_m * config.block_k
    grid = (num_samples * triton.cdiv(K, config.block_k), splits, triton.cdiv(M, config.block_m))
    _linear_backward_input_kernel[grid](
        grad_x,
        new_splits(grad_y, splits, grid[0] * grid[2], tile, 32 * config.num_warps) if splits > 1 else None,
        grad_y,
        second_grad,
        x,
        second_x,
        gaussian((mu, rho)),
        *key,
        num_samples,
        M,
        N,
        K,
        *grad_y.stride(),
        row_offset,
        column_offset // 4,
        stream,
        tiles_per_split,
        EVEN_N=N % config.block_n == 0,
        GRAD_QUADS=whole_quads(grad_y.stride()),
        **dot_options(grad_y),
        ESTIMATOR=estimator,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return grad_x

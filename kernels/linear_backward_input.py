"""dX = dY W with the forward's W drawn again inside the product."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

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
from fusedbayes.kernels.sample import sample_weight
from fusedbayes.kernels.select import select_config
from fusedbayes.kernels.sums import partial_results, reduce


class _Tiles(NamedTuple):
    """What the steps of a program share.

    Attributes:
        grad_y_ptr, mu_ptr, rho_ptr: at the split's first row; grad_y_offsets (BLOCK_N, BLOCK_M), weight_offsets
            (BLOCK_N, BLOCK_K): of its first tile of rows.
        noise: of the first tile of rows.
        rows_left: of the split.
    """

    grad_y_ptr: Any
    grad_y_offsets: Any
    stride_gn: Any
    mu_ptr: Any
    rho_ptr: Any
    weight_offsets: Any
    noise: Any
    rows_left: Any
    K: Any


@triton.jit
def _step(grad_x, tile_n, tiles, MASKED: tl.constexpr, DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """One tile of rows: draw W, multiply, add to grad_x (BLOCK_K, BLOCK_M)."""
    BLOCK_N: tl.constexpr = tiles.weight_offsets.shape[0]
    noise = tiles.noise
    done = tile_n * BLOCK_N
    offsets = tiles.weight_offsets + done * tiles.K
    exist = None
    if MASKED:
        exist = (done + tl.arange(0, BLOCK_N) < tiles.rows_left)[:, None]
    mu = load_elements(tiles.mu_ptr, offsets, exist, 0.0).to(tl.float32)
    rho = load_elements(tiles.rho_ptr, offsets, exist, 0.0).to(tl.float32)
    grad_y_ptr = tiles.grad_y_ptr + tl.cast(done, tl.int64) * tiles.stride_gn
    grad_y = load_elements(grad_y_ptr, tiles.grad_y_offsets, exist, 0.0)
    eps = normal_tile(noise.seed, noise.rows + done, noise.columns, noise.sample, noise.stream)
    weight = (mu + sigma_from_rho(rho) * eps).to(grad_y.dtype)
    return tl.dot(tl.trans(weight.to(DOT_DTYPE)), grad_y.to(DOT_DTYPE), grad_x, input_precision=INPUT_PRECISION)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_backward_input_kernel(
    grad_x_ptr,  # (M, K) row-major, or (splits, M, K) fp32 partial results
    grad_y_ptr,  # (M, N)
    weight,  # a `Gaussian` (N, K)
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
    tiles_per_split,  # so many that their weights' offsets fit 32 bits
    EVEN_N: tl.constexpr,  # BLOCK_N divides N
    GRAD_QUADS: tl.constexpr,  # grad_y has whole quads of adjacent columns
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dX^T = W^T dY^T over a split of the rows, the sampled tile on the tensor cores' M side.

    Grid: (cdiv(K, BLOCK_K), splits, cdiv(M, BLOCK_M)). 4 divides K and the shard's first column.
    """
    K = K // 4 * 4  # for the compiler to see
    if GRAD_QUADS:
        stride_gm = stride_gm // 4 * 4
    tile_k, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The last tile moves left until it fits; what it shares with its neighbour both compute and write alike.
    first_column = tl.minimum(tile_k * BLOCK_K, K - BLOCK_K)
    first_row, first_batch = split * tiles_per_split * BLOCK_N, tile_m * BLOCK_M
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    batch = first_batch + tl.arange(0, BLOCK_M)
    # Batch rows that stick out repeat the last one: multiplied, and not stored.
    grad_y_offsets = (tl.minimum(batch, M - 1) - first_batch)[None, :] * stride_gm + rows[:, None] * stride_gn
    grad_y_ptr += first_batch.to(tl.int64) * stride_gm + first_row.to(tl.int64) * stride_gn
    weight_offsets = rows[:, None] * K + columns[None, :]
    start = first_row.to(tl.int64) * K + first_column
    rows_left = tl.minimum(N - first_row, tiles_per_split * BLOCK_N)
    seed, sample = load_key(seed_ptr, sample_ptr)
    quads = quad_offset + first_column // 4 + tl.arange(0, BLOCK_K // 4)
    noise = Noise(seed, row_offset + first_row + rows, quads, sample, stream)
    tiles = _Tiles(
        grad_y_ptr,
        grad_y_offsets,
        stride_gn,
        weight.mu + start,
        weight.rho + start,
        weight_offsets,
        noise,
        rows_left,
        K,
    )
    grad_x = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    full = rows_left // BLOCK_N
    for tile_n in range(full):
        grad_x = _step(grad_x, tile_n, tiles, False, DOT_DTYPE, INPUT_PRECISION)
    if not EVEN_N:
        if full * BLOCK_N < rows_left:
            grad_x = _step(grad_x, full, tiles, True, DOT_DTYPE, INPUT_PRECISION)
    # 32-bit offsets within the tile: of a large one, 64-bit addresses would not fit the registers.
    grad_x_ptr += (split.to(tl.int64) * M + first_batch) * K + first_column
    offsets = tl.arange(0, BLOCK_M)[None, :] * K + columns[:, None]
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=(batch < M)[None, :])


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
    config = config or select_config("backward_input", (M, N, K), grad_y.dtype, capability(grad_y), allow_tf32())
    if not (config.single_pass and fits("backward_input", config, (M, N, K)) and column_offset % 4 == 0):
        weight, _ = sample_weight(mu, rho, None, None, seed, sample, address, grad_y.dtype, False)
        return grad_y @ weight
    grad_y = with_near_rows(grad_y, max(config.block_m, config.block_n))
    tiles_n = triton.cdiv(N, config.block_n)
    tiles_per_split = min(triton.cdiv(tiles_n, config.splits), 2**31 // (config.block_n * K) - 1)
    assert tiles_per_split > 0  # `fits` sees to it
    splits = triton.cdiv(tiles_n, tiles_per_split)
    grad_x = grad_y.new_empty((M, K))
    partial = partial_results(grad_x, splits)
    _linear_backward_input_kernel[(triton.cdiv(K, config.block_k), splits, triton.cdiv(M, config.block_m))](
        partial,
        grad_y,
        gaussian((mu, rho)),
        seed,
        sample,
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
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return reduce(grad_x, partial, splits)

"""dX = dY W with the forward's W drawn again inside the product."""

from collections.abc import Sequence

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
from fusedbayes.kernels.noise import load_key, normal_tile
from fusedbayes.kernels.sample import sample_weight
from fusedbayes.kernels.select import select_config
from fusedbayes.kernels.sums import partial_results, reduce


@triton.jit
def _step(
    grad_x,  # (BLOCK_K, BLOCK_M)
    tile_n,
    tensors,  # pointers to grad_y, mu and rho, at the split's first row
    grad_y_offsets,
    weight_offsets,
    noise,  # seed, first row, quads, sample, stream
    rows_left,
    K,
    stride_gn,
    MASKED: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of rows: draw W and multiply."""
    grad_y_ptr, mu_ptr, rho_ptr = tensors
    seed, first_row, quads, sample, stream = noise
    done = tile_n * BLOCK_N
    rows = done + tl.arange(0, BLOCK_N)
    offsets = weight_offsets + done * K
    grad_y_tile = grad_y_ptr + tl.cast(done, tl.int64) * stride_gn + grad_y_offsets
    if MASKED:
        exist = (rows < rows_left)[:, None]
        mu = tl.load(mu_ptr + offsets, mask=exist, other=0.0)
        rho = tl.load(rho_ptr + offsets, mask=exist, other=0.0)
        grad_y = tl.load(grad_y_tile, mask=exist, other=0.0)
    else:
        mu, rho, grad_y = tl.load(mu_ptr + offsets), tl.load(rho_ptr + offsets), tl.load(grad_y_tile)
    eps = normal_tile(seed, first_row + rows, quads, sample, stream)
    weight = (mu.to(tl.float32) + sigma_from_rho(rho.to(tl.float32)) * eps).to(grad_y.dtype)
    return tl.dot(tl.trans(weight.to(DOT_DTYPE)), grad_y.to(DOT_DTYPE), grad_x, input_precision=INPUT_PRECISION)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _linear_backward_input_kernel(
    grad_x_ptr,  # (M, K) row-major, or (splits, M, K) fp32 partial results
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
    columns = first_column + tl.arange(0, BLOCK_K)
    first_batch = tile_m * BLOCK_M
    batch = first_batch + tl.arange(0, BLOCK_M)
    first_row = split * tiles_per_split * BLOCK_N
    rows_left = tl.minimum(N - first_row, tiles_per_split * BLOCK_N)
    start = first_row.to(tl.int64) * K + first_column
    # Batch rows that stick out repeat the last one: multiplied, and not stored.
    grad_y_offsets = (tl.minimum(batch, M - 1) - first_batch)[None, :] * stride_gm
    grad_y_offsets += tl.arange(0, BLOCK_N)[:, None] * stride_gn
    weight_offsets = tl.arange(0, BLOCK_N)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    grad_y_ptr += first_batch.to(tl.int64) * stride_gm + first_row.to(tl.int64) * stride_gn
    tensors = (grad_y_ptr, mu_ptr + start, rho_ptr + start)
    seed, sample = load_key(seed_ptr, sample_ptr)
    quads = quad_offset + first_column // 4 + tl.arange(0, BLOCK_K // 4)
    noise = (seed, row_offset + first_row, quads, sample, stream)
    grad_x = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    full = rows_left // BLOCK_N
    for tile_n in range(full):
        grad_x = _step(
            grad_x,
            tile_n,
            tensors,
            grad_y_offsets,
            weight_offsets,
            noise,
            rows_left,
            K,
            stride_gn,
            False,
            DOT_DTYPE,
            INPUT_PRECISION,
            BLOCK_N,
        )
    if not EVEN_N:
        if full * BLOCK_N < rows_left:
            grad_x = _step(
                grad_x,
                full,
                tensors,
                grad_y_offsets,
                weight_offsets,
                noise,
                rows_left,
                K,
                stride_gn,
                True,
                DOT_DTYPE,
                INPUT_PRECISION,
                BLOCK_N,
            )
    tl.store(
        grad_x_ptr + (split.to(tl.int64) * M + batch.to(tl.int64))[None, :] * K + columns[:, None],
        grad_x.to(grad_x_ptr.dtype.element_ty),
        mask=(batch < M)[None, :],
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

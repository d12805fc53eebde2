"""Noise alone, of any rows: normals for what an embedding looks up and for a convolution's outputs, random signs."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.config import TileConfig
from fusedbayes.kernels.launch import NOT_SPECIALIZED
from fusedbayes.kernels.noise import load_key, negative_quads
from fusedbayes.kernels.quads import normal_quads, quad_columns, store_quads
from fusedbayes.kernels.sample import programs_of, row_tile, tile_constants
from fusedbayes.kernels.select import select_tile_config


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _noise_kernel(
    out_ptr,  # (N, K)
    rows_ptr,  # (N,) int64
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    N,
    K,
    row_offset,
    quad_offset,
    stream,
    SIGNS: tl.constexpr,
    COLUMN_SHIFT: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,  # 4 divides K, and COLUMN_SHIFT is 0
    EVEN: tl.constexpr,  # BLOCK_K divides K, and COLUMN_SHIFT is 0
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, k] = eps(seed, row_offset + rows[n], k), or a random sign.

    Grid: (cdiv(N, BLOCK_N) * cdiv(K + COLUMN_SHIFT, BLOCK_K),).
    """
    if WHOLE_QUADS:
        K = K // 4 * 4  # for the compiler to see
    begin, end, column, quads = row_tile(tl.program_id(0), N, K, quad_offset, COLUMN_SHIFT, BLOCK_N, BLOCK_K)
    columns, exist = quad_columns(column, K, COLUMN_SHIFT, WHOLE_QUADS, EVEN, BLOCK_K)
    seed, sample = load_key(seed_ptr, sample_ptr)
    out_row = out_ptr + (begin.to(tl.int64) * K + column)
    for n in range(begin, end):
        row = row_offset + tl.load(rows_ptr + n)
        if SIGNS:
            tile = tl.where(negative_quads(seed, quads, row, sample, stream), -1.0, 1.0)
        else:
            tile = normal_quads(seed, quads, row, sample, stream)
        store_quads(out_row, columns, tile, exist, WHOLE_QUADS)
        out_row += K


def _launch(
    signs: bool,
    rows: Tensor,
    columns: int,
    key: tuple[Tensor, Tensor | None],
    address: Sequence[int],
    dtype: torch.dtype,
    config: TileConfig | None,
) -> Tensor:
    out = rows.new_empty((rows.shape[0], columns), dtype=dtype)
    config = config or select_tile_config(out.shape)
    programs = programs_of(out.shape, address, config, with_bias=False)
    if programs > 0:
        stream, row_offset, column_offset = address
        _noise_kernel[(programs,)](
            out,
            rows.contiguous(),
            *key,
            *out.shape,
            row_offset,
            column_offset // 4,
            stream,
            SIGNS=signs,
            **tile_constants(out.shape, address, config),
        )
    return out


def normal(
    rows: Tensor,
    columns: int,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
    dtype: torch.dtype,
    config: TileConfig | None = None,
) -> Tensor:
    """eps of these rows; see the operator of this name."""
    return _launch(False, rows, columns, (seed, sample), address, dtype, config)


def signs(
    rows: Tensor,
    columns: int,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
    dtype: torch.dtype,
    config: TileConfig | None = None,
) -> Tensor:
    """Random signs of these rows; see the operator of this name."""
    return _launch(True, rows, columns, (seed, sample), address, dtype, config)

"""Tiles of weights in the order in which the tensor cores read them: a thread multiplies the weights that it draws.

Of a 16 x 16 block of the 16-bit operand (wgmma's and mma's A) thread 4g + t of a warp has rows g and g + 8, columns 2t,
2t + 1, 2t + 8 and 2t + 9. A product may go through its columns in any order: here these four are a quad, 4t .. 4t + 3,
and the rows of x are loaded in the same order. Triton gives a tile of 16 adjacent columns to 8 rows of 4 threads in
each of 4 warps, 32 rows, then to the same threads again; a block has 16 rows: the rows are taken in an order that makes
both the same. The result does not depend on who has what: if Triton divides a tile otherwise, weights change threads.
"""

import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.config import MatmulConfig
from fusedbayes.kernels.launch import capability
from fusedbayes.kernels.noise import interleaved, normals

WIDTH = tl.constexpr(16)  # columns of a block


def in_fragments(config: MatmulConfig, samples: int, x: Tensor) -> bool:
    """Whether it is worth it: of several samples, which have few batch rows.

    x is then loaded pair by pair, which costs more than it saves where there are many rows of it. On sm_80 eight
    samples would spill; sm_100 takes its operands from another memory. The interpreter is to go this way too.
    """
    return samples > 1 and config.block_m <= 32 and x.dtype.itemsize == 2 and capability(x)[0] in (9, 0)


@triton.jit
def fragment_rows(ROWS: tl.constexpr):
    """The row of the operand that each row of a tile is: 0 .. ROWS - 1 in another order."""
    row = tl.arange(0, ROWS)
    return row % 8 + row // (ROWS // 2) * 8 + row // 8 % (ROWS // 16) * 16


@triton.jit
def fragment_columns(COLUMNS: tl.constexpr):
    """The column of a tile that each column of the operand is: 0 .. COLUMNS - 1 in another order."""
    column = tl.arange(0, COLUMNS)
    return column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2


@triton.jit
def block_columns(COLUMNS: tl.constexpr):
    """The columns of a tile's blocks, (COLUMNS / 16, 1, 16): 0 .. COLUMNS - 1."""
    return (tl.arange(0, COLUMNS // 16) * 16)[:, None, None] + tl.arange(0, 16)[None, None, :]


@triton.jit
def normal_blocks(seed, rows, quads, sample, stream, IN_ROOTS: tl.constexpr):
    """`normal_tile` in blocks: (Q / 4, R, 16)."""
    quads = tl.reshape(quads, (quads.shape[0] // 4, 4))[:, None, :]
    tile = interleaved(normals(seed, quads, rows[None, :, None], sample, stream, IN_ROOTS))
    return tl.reshape(tile, (quads.shape[0], rows.shape[0], WIDTH))


@triton.jit
def as_operand(blocks):
    """(C / 16, R, 16) as the product's operand (R, C), rows and columns in the order of the operand."""
    ROWS: tl.constexpr = blocks.shape[1]
    tile = tl.reshape(blocks, (blocks.shape[0], 2, ROWS // 16, 8, 4, 2, 2))
    return tl.reshape(tl.permute(tile, (2, 1, 3, 0, 5, 4, 6)), (ROWS, blocks.shape[0] * WIDTH))


@triton.jit
def side_by_side(blocks):
    """(C / 16, R, 16) as (R, C), rows and columns in the order of the tile; a matrix as it is."""
    if len(blocks.shape) == 3:
        blocks = tl.reshape(tl.permute(blocks, (1, 0, 2)), (blocks.shape[1], blocks.shape[0] * WIDTH))
    return blocks

"""The noise contract as Triton device functions: `fusedbayes.noise`, word for word.

A tile's four adjacent columns share one Philox call; two joins and a reshape put the four normals where the thread
that loads those four weights wants them, without a shuffle.
"""

import triton
import triton.language as tl

from fusedbayes.kernels.math import cos, log, sin, sqrt

ROUNDS = tl.constexpr(7)


@triton.jit
def philox_words(seed, quads, rows, sample, stream):
    """Philox4x32-7 at counters (quads, rows, sample, stream): four uint32 tensors of the broadcast shape.

    seed: int64 scalar; quads, rows: integer tensors, sample, stream: integer scalars, all in [0, 2^32).
    """
    quads, rows = tl.broadcast(quads.to(tl.uint32), rows.to(tl.uint32))
    # Eager launches pass scalars as 32 or 64 bit integers, by value: fix the width before Philox looks at it.
    sample = tl.cast(sample, tl.uint32)
    stream = tl.cast(stream, tl.uint32)
    return tl.philox(seed, quads, rows, sample, stream, ROUNDS)


@triton.jit
def load_key(seed_ptr, sample_ptr):
    """The seed, and the Monte Carlo sample or 0 if sample_ptr is None."""
    sample = tl.zeros((), tl.int64)
    if sample_ptr is not None:
        sample = tl.load(sample_ptr)
    return tl.load(seed_ptr), sample


@triton.jit
def _box_muller(radius_word, angle_word):
    """Two standard normals of two words: u = x0 2^-32 + 2^-33, theta = pi int32(x1) 2^-31."""
    uniform = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    theta = (angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10) * 3.141592653589793
    radius = sqrt(-2.0 * log(uniform))
    return radius * cos(theta), radius * sin(theta)


@triton.jit
def normal_tile(seed, rows, quads, sample, stream):
    """eps(seed, row, column, sample, stream) for rows (R,) and the columns 4q .. 4q+3 of quads (Q,): (R, 4 Q) fp32.

    Rows and quads are global coordinates; both fit 32 bits, so no element of a tensor is out of reach.
    """
    x0, x1, x2, x3 = philox_words(seed, quads[None, :], rows[:, None], sample, stream)
    z0, z1 = _box_muller(x0, x1)
    z2, z3 = _box_muller(x2, x3)
    # (R, Q, 2, 2), last axis fastest: z0 z1 z2 z3.
    eps = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(eps, (eps.shape[0], 4 * eps.shape[1]))


@triton.jit
def column_tile(tile_k, K, quad_offset, COLUMN_SHIFT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tile tile_k of K columns: local columns (BLOCK_K,), which of them exist, and global quads (BLOCK_K // 4,).

    Tiles begin at whole quads of the global tensor. A shard that begins COLUMN_SHIFT columns into one therefore has
    its first tile begin at column -COLUMN_SHIFT, and cdiv(K + COLUMN_SHIFT, BLOCK_K) tiles.
    """
    columns = tile_k * BLOCK_K - COLUMN_SHIFT + tl.arange(0, BLOCK_K)
    exist = columns < K
    if COLUMN_SHIFT > 0:
        exist = exist & (columns >= 0)
    return columns, exist, quad_offset + tile_k * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)

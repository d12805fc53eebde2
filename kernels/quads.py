"""Quads, four adjacent columns: what one thread loads, draws by one Philox call, and adds up.

The elementwise passes see a tile of one row as (Q, 4), and what there is once for each quad as (Q, 1).
"""

import triton
import triton.language as tl

from fusedbayes.kernels.noise import normals


@triton.jit
def quad_columns(
    column, K, COLUMN_SHIFT: tl.constexpr, WHOLE_QUADS: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr
):
    """0 .. BLOCK_K - 1 as (BLOCK_K // 4, 4), and which of the columns from `column` on exist."""
    quad = 4 * tl.arange(0, BLOCK_K // 4)[:, None]
    in_quad = tl.arange(0, 4)[None, :]
    if EVEN:
        exist = tl.full((BLOCK_K // 4, 4), True, tl.int1)  # folded: loads and stores have no mask
    elif WHOLE_QUADS:
        exist = column + quad + tl.zeros_like(in_quad) < K  # the same for all four, for the compiler to see
    else:
        exist = column + quad + in_quad < K
        if COLUMN_SHIFT > 0:
            exist = exist & (column + quad + in_quad >= 0)
    return quad + in_quad, exist


@triton.jit
def _split(tile):
    """(R, 4 Q) to four (R, Q), the columns 4q, 4q+1, 4q+2 and 4q+3; nothing moves, the four are in one thread."""
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _join(first, second, third, fourth):
    """The inverse of `_split` for a (Q, 4)."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (first.shape[0], 4))


@triton.jit
def load_quads(row, columns, exist, other: tl.constexpr, WHOLE_QUADS: tl.constexpr):
    """The tile at `row` in fp32, (Q, 4), `other` where nothing exists.

    What cannot be loaded by whole quads is loaded column by column: a tile of single words would be spread over the
    threads word by word, away from the normals.
    """
    if WHOLE_QUADS:
        tile = tl.load(row + columns, mask=exist, other=other)
    else:
        c0, c1, c2, c3 = _split(columns)
        e0, e1, e2, e3 = _split(exist)
        v0 = tl.load(row + c0, mask=e0, other=other)
        v1 = tl.load(row + c1, mask=e1, other=other)
        v2 = tl.load(row + c2, mask=e2, other=other)
        v3 = tl.load(row + c3, mask=e3, other=other)
        tile = _join(v0, v1, v2, v3)
    return tile.to(tl.float32)


@triton.jit
def store_quads(row, columns, tile, exist, WHOLE_QUADS: tl.constexpr):
    """Stores the tile (Q, 4) to `row`: the counterpart of `load_quads`."""
    tile = tile.to(row.dtype.element_ty)
    if WHOLE_QUADS:
        tl.store(row + columns, tile, mask=exist)
    else:
        c0, c1, c2, c3 = _split(columns)
        e0, e1, e2, e3 = _split(exist)
        v0, v1, v2, v3 = _split(tile)
        tl.store(row + c0, v0, mask=e0)
        tl.store(row + c1, v1, mask=e1)
        tl.store(row + c2, v2, mask=e2)
        tl.store(row + c3, v3, mask=e3)


@triton.jit
def normal_quads(seed, quads, row, sample, stream):
    """eps of the columns 4q .. 4q+3 of quads (Q, 1) in one row: (Q, 4) fp32."""
    z0, z1, z2, z3 = normals(seed, quads, row, sample, stream)
    return _join(z0, z1, z2, z3)


@triton.jit
def sum_quads(tile):
    """(R, 4 Q) to (R, Q): sums of four adjacent columns."""
    a, b, c, d = _split(tile)
    return (a + b) + (c + d)


@triton.jit
def sum_difference_of_squares_of_quads(first, second, start):
    """(R, 4 Q) twice to (R, Q): `start`, and of four adjacent columns the first's squares less the second's."""
    a, b, c, d = _split(first)
    e, f, g, h = _split(second)
    return start + a * a - e * e + b * b - f * f + c * c - g * g + d * d - h * h


@triton.jit
def sum_squares_of_quads(first, second, start):
    """(R, 4 Q) twice to (R, Q): `start` and the squares of four adjacent columns of both, one multiply-add each."""
    a, b, c, d = _split(first)
    e, f, g, h = _split(second)
    return start + a * a + b * b + c * c + d * d + e * e + f * f + g * g + h * h

"""The noise contract as Triton device functions: `fusedbayes.noise`, word for word.

Four adjacent columns share one Philox call. Its four normals end in the thread that loads those four weights, without a
shuffle.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedbayes.kernels import streams
from fusedbayes.kernels.math import cos, log2, multiply_wide, negative, scaled_difference, sin, sqrt

ROUNDS = tl.constexpr(7)
ROOT = tl.constexpr(1.1774100225154747)  # sqrt(2 ln 2)
WIDER = tl.constexpr(1.0 + 2.0**-22)
SLOPE = tl.constexpr(2.00135 / 1.3862943611198906)  # over 2 ln 2, for the logarithm to base 2
UNIT = tl.constexpr(2.0**-32)
LOCAL, FLIPOUT_INPUT, FLIPOUT_OUTPUT = map(tl.constexpr, (streams.LOCAL, streams.FLIPOUT_INPUT, streams.FLIPOUT_OUTPUT))


class Noise(NamedTuple):
    """What the normals of a tile or a vector are drawn from: the arguments of `normal_tile` or of `normal_vector`."""

    seed: Any
    rows: Any
    columns: Any  # of a tile: its quads
    sample: Any
    stream: Any


@triton.jit
def philox_words(seed, quads, rows, sample, stream):
    """Philox4x32-7 at counters (quads, rows, sample, stream): four uint32 tensors of the broadcast shape.

    seed: int64 scalar; quads, rows, sample, stream: integers in [0, 2^32), the last two scalars. What of the first
    rounds depends on less than the broadcast shape is computed in its own shape, outside of loops that leave it alone.
    """
    x0, x1 = quads.to(tl.uint32), tl.cast(rows, tl.uint32)
    # Eager launches pass scalars as 32 or 64 bit integers, by value: fix the width.
    x2, x3 = tl.cast(sample, tl.uint32), tl.cast(stream, tl.uint32)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0, low0 = multiply_wide(x0, 0xD2511F53)
        high1, low1 = multiply_wide(x2, 0xCD9E8D57)
        # The brackets keep what is the same for many columns together.
        x0, x1, x2, x3 = high1 ^ (x1 ^ key0), low1, high0 ^ (x3 ^ key1), low0
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return x0, x1, x2, x3


@triton.jit
def load_key(seed_ptr, sample_ptr):
    """The seed, and the Monte Carlo sample or 0 if sample_ptr is None."""
    sample = tl.zeros((), tl.int64)
    if sample_ptr is not None:
        sample = tl.load(sample_ptr)
    return tl.load(seed_ptr), sample


@triton.jit
def _box_muller(radius_word, angle_word, IN_ROOTS: tl.constexpr):
    """Two standard normals of two words: u = x0 2^-32 + 2^-33, theta = pi int32(x1) 2^-31, z = r (cos, sin) theta.

    r^2 = -2 ln u. Near u = 1 the hardware's logarithm may be wrong by more than r^2 itself, but there r^2 is nearly
    2 (1 - u): take the larger of that line and of the logarithm less its largest error, 2 ln 2 2^-22. The line's slope
    balances the errors of r on both sides of where they cross, u = 0.9984: 5.8e-6 (docs/kernels.md).

    IN_ROOTS: z / ROOT, an instruction less. A larger u lowers the logarithm; both terms are multiply-adds of the word,
    the line without the 2^-33, which is rounded away where it counts. 6.8e-6.
    """
    word = radius_word.to(tl.float32)
    if IN_ROOTS:
        logarithm = negative(log2(word * (UNIT * WIDER) + 0.5 * UNIT))
        squared = tl.maximum(logarithm, scaled_difference(SLOPE, UNIT, word))
    else:
        u = word * UNIT + 0.5 * UNIT
        squared = tl.maximum(log2(u) * (-ROOT * ROOT) - 3.31e-7, scaled_difference(2.0012, 1.0, u))
    theta = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # pi 2^-31
    radius = sqrt(squared)
    return radius * cos(theta), radius * sin(theta)


@triton.jit
def normals(seed, quads, rows, sample, stream, IN_ROOTS: tl.constexpr = False):
    """eps of the four columns of each quad, four fp32 tensors of the shape that quads and rows broadcast to.

    IN_ROOTS: eps / ROOT, for who has another factor to multiply by ROOT once for many normals.
    """
    x0, x1, x2, x3 = philox_words(seed, quads, rows, sample, stream)
    z0, z1 = _box_muller(x0, x1, IN_ROOTS)
    z2, z3 = _box_muller(x2, x3, IN_ROOTS)
    return z0, z1, z2, z3


@triton.jit
def interleaved(four):
    """Four tensors as one, with the four elements of a place side by side in a last dimension.

    By selects among constants that the compiler folds away. tl.join would do too, but Triton takes a join before a dot
    for the unpacking of 4-bit weights and arranges the operand for that: on sm_80 five more moves per weight.
    """
    z0, z1, z2, z3 = four
    lane = tl.arange(0, 4)
    for _ in tl.static_range(len(z0.shape)):
        lane = tl.expand_dims(lane, 0)
    low = tl.where(lane == 0, tl.expand_dims(z0, -1), tl.expand_dims(z1, -1))
    high = tl.where(lane == 2, tl.expand_dims(z2, -1), tl.expand_dims(z3, -1))
    return tl.where(lane < 2, low, high)


@triton.jit
def normal_tile(seed, rows, quads, sample, stream, IN_ROOTS: tl.constexpr = False):
    """eps(seed, row, column, sample, stream) for rows (R,) and the columns 4q .. 4q+3 of quads (Q,): (R, 4 Q) fp32.

    Rows and quads are global coordinates; both fit 32 bits, so no element of a tensor is out of reach. IN_ROOTS: see
    `normals`.
    """
    tile = interleaved(normals(seed, quads[None, :], rows[:, None], sample, stream, IN_ROOTS))
    return tl.reshape(tile, (rows.shape[0], 4 * quads.shape[0]))


@triton.jit
def normal_vector(seed, row, columns, sample, stream):
    """eps of one row at columns (C,), wherever their quads begin: a Philox call for each, so only for a bias."""
    z0, z1, z2, z3 = normals(seed, columns // 4, row, sample, stream)
    lane = columns % 4
    return tl.where(lane < 2, tl.where(lane == 0, z0, z1), tl.where(lane == 2, z2, z3))


@triton.jit
def _pick(words, index):
    """The word of this index, 0 to 3, elementwise."""
    x0, x1, x2, x3 = words
    return tl.where(index < 2, tl.where(index == 0, x0, x1), tl.where(index == 2, x2, x3))


@triton.jit
def negative_quads(seed, quads, row, sample, stream):
    """Whether the signs of the columns 4q .. 4q+3 of quads (Q, 1) in one row are -1: (Q, 4)."""
    quads = tl.cast(quads, tl.uint32)  # as an int32 it may have overflowed
    word = _pick(philox_words(seed, quads // 32, row, sample, stream), quads // 8 % 4)
    return (word >> (quads % 8 * 4 + tl.arange(0, 4)[None, :]).to(tl.uint32)) & 1 != 0


@triton.jit
def negative_tile(seed, quad, rows, sample, stream, COLUMNS: tl.constexpr):
    """Whether signs are -1 of COLUMNS columns from `quad` on, all in one block of 128, and rows (R,): (COLUMNS, R)."""
    columns = (quad % 32 * 4).to(tl.int32) + tl.arange(0, COLUMNS)[:, None]
    x0, x1, x2, x3 = philox_words(seed, quad // 32, rows, sample, stream)
    word = _pick((x0[None, :], x1[None, :], x2[None, :], x3[None, :]), columns // 32)
    return (word >> (columns % 32).to(tl.uint32)) & 1 != 0

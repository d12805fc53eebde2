"""Counter-based noise: every random number is a pure function of what it is for.

A normal is addressed by a seed and five coordinates: row and column in the (two-dimensional, unsharded) tensor it
perturbs, Monte Carlo sample and stream::

    key     = (low 32 bits of the seed, high 32 bits of the seed)
    counter = (column // 4, row, sample, stream)
    words   = Philox4x32-7(counter, key)              # four 32-bit words, for columns 4q .. 4q+3

so neither tile sizes, launch order, device, backend nor sharding change it. This module is the definition, in PyTorch;
`fusedbayes.kernels` holds the same function in Triton and in C++, equal word for word.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32, which passes
BigCrush from seven rounds on); Box and Muller, "A note on the generation of random normal deviates", 1958.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedbayes.checks import describe

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
# Rows drawn at once: bounds the int64 temporaries to a few MiB, which stay in the cache.
_CHUNK_WORDS = 1 << 16


class Role:
    """What a stream is for. A stream's number is ``8 * layer + role``, where only `frozen_sample` sets ``layer``.

    Plain integers, because torch.compile does not compare the members of an enumeration (torch 2.11).
    """

    WEIGHT = 0
    BIAS = 1
    LOCAL = 2
    FLIPOUT_INPUT = 3
    FLIPOUT_OUTPUT = 4


class Address(NamedTuple):
    """Where a tensor's noise lies, for a given seed.

    Attributes:
        stream: which tensor of which layer, in [0, 2**32); see `Role`.
        row_offset, column_offset: where a shard begins in the whole tensor seen as two-dimensional.
    """

    stream: int = 0
    row_offset: int = 0
    column_offset: int = 0


def draw_seed(device: torch.device | str | None = None) -> Tensor:
    """Draws a fresh seed from torch's own generator of `device`, without synchronising.

    `torch.manual_seed`, activation checkpointing and CUDA graph replay therefore treat it like any other random draw.

    Returns:
        0-d int64 tensor on `device`, uniform over [0, 2**63 - 1).
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def as_seed(seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Makes the seed tensor that the operators take.

    Args:
        seed: an integer in [-2**63, 2**64), of which the 64 bits count, or a 0-d int64 tensor.
        device: where the tensor goes; None leaves a tensor where it is and puts an integer on the CPU.

    Returns:
        0-d int64 tensor.

    Raises:
        TypeError: `seed` is neither an integer nor an int64 tensor.
        ValueError: an integer that does not fit 64 bits, or a tensor that is not 0-d.
    """
    return _as_int64(seed, "seed", -(2**63), 2**64, device)


def as_sample(sample: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Makes the tensor that holds the index of a Monte Carlo sample; like `as_seed`, for integers in [0, 2**32)."""
    return _as_int64(sample, "sample", 0, 2**32, device)


def _as_int64(value: int | Tensor, name: str, low: int, end: int, device: torch.device | str | None) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be an int or an int64 tensor, got a tensor of dtype {value.dtype}")
        if value.dim() != 0:
            raise ValueError(f"{name} must be a 0-d tensor, got shape {tuple(value.shape)}")
        return value if device is None else value.to(device)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or a 0-d int64 tensor, got {describe(value)}")
    if not low <= value < end:
        raise ValueError(f"{name} must lie in [{low}, {end}), got {value}")
    # Filled on the device: a copy from the host would wait for it.
    value = value - 2**64 if value >= 2**63 else value
    return torch.full((), value, dtype=torch.int64, device="cpu" if device is None else device)


def philox_words(
    seed: int | Tensor, quads: Tensor, rows: Tensor, sample: int | Tensor, stream: int
) -> tuple[Tensor, ...]:
    """Philox4x32-7 at counters ``(quads, rows, sample, stream)``.

    Args:
        seed: 64-bit key, an int or a 0-d int64 tensor.
        quads, rows: int64 tensors with values in [0, 2**32), broadcast against each other.
        sample, stream: integers in [0, 2**32); sample may be a 0-d int64 tensor.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    outer, inner = _philox(as_seed(seed, quads.device), quads, rows, as_sample(sample, quads.device), stream)
    return outer[0], inner[0], outer[1], inner[1]


def _philox(seed: Tensor, quads: Tensor, rows: Tensor, sample: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """The words as (x0, x2) and (x1, x3), stacked: both halves of a round in one operation, which small blocks need."""
    shape = torch.broadcast_shapes(quads.shape, rows.shape)
    # A sample that follows the last one is the first.
    outer = torch.stack([quads.expand(shape), (sample & _MASK).expand(shape)])
    inner = torch.stack([rows.expand(shape), torch.full_like(sample, stream).expand(shape)])
    lanes = (2,) + (1,) * len(shape)
    key = torch.stack([seed, seed >> 32]).view(lanes)
    # Filled, not copied from the host, which would wait for the device.
    multipliers, steps = quads.new_empty(2), quads.new_empty(2)
    multipliers[0], multipliers[1] = _MULTIPLIERS
    steps[0], steps[1] = _KEY_STEPS
    multipliers, steps = multipliers.view(lanes), steps.view(lanes)
    for done in range(ROUNDS):
        # A 64-bit product that wraps keeps all its bits; the shift's sign extension is masked away.
        product = (outer * multipliers).flip(0)
        # Out of place where vmap may have batched one operand and not the other.
        outer = (product >> 32).bitwise_and_(_MASK) ^ (inner ^ ((key + done * steps) & _MASK))
        inner = product.bitwise_and_(_MASK)
    return outer, inner


def _box_muller(radius_words: Tensor, angle_words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Both uniforms are rounded to fp32 whatever the dtype, so that an fp64 run draws the noise of an fp32 run.
    uniform = radius_words.float().mul_(2.0**-32).add_(2.0**-33)
    theta = angle_words.to(torch.int32).float().mul_(2.0**-31).to(dtype).mul_(math.pi)
    radius = uniform.to(dtype).log_().mul_(-2.0).sqrt_()
    return radius * theta.cos(), theta.sin_().mul_(radius)


def normal(
    seed: int | Tensor,
    rows: int | Tensor,
    columns: int,
    *,
    sample: int | Tensor = 0,
    stream: int = 0,
    row_offset: int = 0,
    column_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws the standard normals of a (rows, columns) block of a larger tensor.

    ``eps[i, j]`` depends on `seed`, `sample`, `stream` and the *global* coordinates ``(row_offset + i, column_offset +
    j)`` alone: a shard that passes its offsets draws exactly its part of the whole.

    Args:
        seed: an int, or a 0-d int64 tensor.
        rows, columns: size of the block, 0 or more. For rows that are not adjacent, ``rows`` is an int64 vector, and
            row i of the result has the global row ``row_offset + rows[i]`` (values are not checked).
        sample: index of the Monte Carlo sample, in [0, 2**32), an int or a 0-d int64 tensor (whose value is not
            checked).
        stream: which tensor of which layer the noise is for, in [0, 2**32).
        row_offset, column_offset: where the block begins; rows stay below 2**32, columns below 2**34.
        dtype: float32 (default) or float64; both round the same uniforms and agree to 1e-5.
        device: default the seed tensor's device, the CPU for an int.

    Returns:
        (rows, columns) tensor of `dtype`, N(0, 1), |eps| <= 6.77.

    Raises:
        TypeError: a coordinate is not an int, or `rows`, `seed` or `dtype` is not of a type given above.
        ValueError: a coordinate is out of range, or `rows` is a tensor, but no vector.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    count = _check_block(rows, columns, stream, row_offset, column_offset)
    seed = as_seed(seed, device)
    sample = as_sample(sample, seed.device)
    first_quad, end_quad = column_offset // 4, -(-(column_offset + columns) // 4)
    quads = torch.arange(first_quad, end_quad, device=seed.device)[None, :]
    chunk = max(1, _CHUNK_WORDS // max(1, end_quad - first_quad))
    blocks = []
    for start in range(0, max(count, 1), chunk):
        end = min(start + chunk, count)
        block_rows = _global_rows(rows, start, end, row_offset, seed.device)
        (z0, z2), (z1, z3) = _box_muller(*_philox(seed, quads, block_rows, sample, stream), dtype)
        blocks.append(torch.stack([z0, z1, z2, z3], -1).flatten(1))
    shift = column_offset - 4 * first_quad
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks))[:, shift : shift + columns]


def signs(
    seed: int | Tensor,
    rows: int | Tensor,
    columns: int,
    *,
    sample: int | Tensor = 0,
    stream: int = 0,
    row_offset: int = 0,
    column_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws the random signs of a (rows, columns) block of a larger tensor: +1 or -1, each with probability 1/2.

    The sign of column c is bit ``c % 32`` of word ``(c // 32) % 4`` at the counter ``(c // 128, row, sample, stream)``,
    -1 where it is set. Arguments and errors as `normal`, for any floating `dtype`.
    """
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {describe(dtype)}")
    count = _check_block(rows, columns, stream, row_offset, column_offset)
    seed = as_seed(seed, device)
    first, end = column_offset // 128, -(-(column_offset + columns) // 128)
    counters = torch.arange(first, end, device=seed.device)[None, :]
    block_rows = _global_rows(rows, 0, count, row_offset, seed.device)
    words = torch.stack(philox_words(seed, counters, block_rows, sample, stream), -1)  # (rows, counters, 4)
    bits = (words[..., None] >> torch.arange(32, device=seed.device)) & 1
    shift = column_offset - 128 * first
    return (1 - 2 * bits).to(dtype).reshape(count, 128 * (end - first))[:, shift : shift + columns]


def _check_block(rows: int | Tensor, columns: int, stream: int, row_offset: int, column_offset: int) -> int:
    """Checks as `check_coordinates` does; returns the number of rows."""
    if isinstance(rows, Tensor) and (rows.dtype != torch.int64 or rows.dim() != 1):
        error = TypeError if rows.dtype != torch.int64 else ValueError
        raise error(f"rows must be an int or an int64 vector, got {describe(rows)}")
    count = rows.numel() if isinstance(rows, Tensor) else rows
    # Of a row that is given by its value no more is known than that there is one.
    extent = min(count, 1) if isinstance(rows, Tensor) else count
    check_coordinates(extent, columns, stream=stream, row_offset=row_offset, column_offset=column_offset)
    return count


def _global_rows(rows: int | Tensor, start: int, end: int, row_offset: int, device: torch.device) -> Tensor:
    """Rows number `start` to `end`, as a column."""
    if isinstance(rows, Tensor):
        return (rows[start:end, None] + row_offset) & _MASK
    return torch.arange(row_offset + start, row_offset + end, device=device)[:, None]


def check_coordinates(
    rows: int,
    columns: int,
    *,
    stream: int = 0,
    row_offset: int = 0,
    column_offset: int = 0,
) -> None:
    """Raises TypeError or ValueError unless the block lies inside the noise's address space (see `normal`)."""
    if (
        type(rows) is type(columns) is type(stream) is type(row_offset) is type(column_offset) is int
        and (0 <= stream < 2**32 and 0 <= rows <= 2**32 - row_offset and 0 <= columns <= 2**34 - column_offset)
        and min(row_offset, column_offset) >= 0
    ):
        return  # as nearly always, and in every forward: what follows would take longer than a small layer
    for name, value in (
        *(("rows", rows), ("columns", columns), ("stream", stream)),
        *(("row_offset", row_offset), ("column_offset", column_offset)),
    ):
        if type(value) is not int and (isinstance(value, bool) or not isinstance(value, int | torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {describe(value)}")
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    for name, value, limit in (
        ("stream", stream, 32),
        ("row_offset + rows", row_offset + rows - 1, 32),
        ("column_offset + columns", column_offset + columns - 1, 34),
    ):
        if value >= 2**limit:
            raise ValueError(f"{name} must address less than 2**{limit}, got {value}")

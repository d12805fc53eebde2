"""How partial sums become one: over the programs of a launch, over the splits of a product.

Always in the same order, so that a run repeats bit for bit.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

KEPT_COUNTERS = 4096  # of a device, as long as no launch needs more
PARTS = tl.constexpr(1024)  # of a sum over programs, added at once

_counters: dict[torch.device, Tensor] = {}  # see `arrival_counters`


class Total(NamedTuple):
    """One number that the programs of a launch add up: where it goes, where their parts go, how many are there."""

    out: Any  # () fp32
    parts: Any  # (parts,) fp32
    counter: Any  # (1,) int32, zero; or more of them


class Splits(NamedTuple):
    """The partial results of a sum over splits, and what is needed to add them up.

    Attributes:
        parts: (splits, tiles, elements of a tile) fp32.
        counters: (1 + tiles,) int32, zeros: how many programs have arrived; the first one is that of a `Total`.
        AT_ONCE: parts of a tile that are loaded together, a constant.
    """

    parts: Any
    counters: Any
    AT_ONCE: Any


def arrival_counters(like: Tensor, number: int) -> Tensor:
    """Zeros on the device, at least so many, which a launch leaves zeros again: no launch to make new ones each time.

    Kernels of the default stream run one after another and share them, kept for good. On another stream each launch
    gets its own: a captured graph's replay may run beside other kernels, and memory of a graph's pool must not be kept.
    """
    if like.is_cuda and torch.cuda.current_stream(like.device).cuda_stream != 0:
        return like.new_zeros(number, dtype=torch.int32)
    known = _counters.get(like.device)
    if known is None or known.numel() < number:
        known = _counters[like.device] = like.new_zeros(max(number, KEPT_COUNTERS), dtype=torch.int32)
    return known


def new_splits(like: Tensor, splits: int, tiles: int, elements: int, threads: int) -> Splits:
    """For a launch on the device of `like`: so many tiles, each of a program's threads."""
    parts = like.new_empty((splits, tiles, elements), dtype=torch.float32)
    # Registers are what limits it, beside those of the sum and of the program's own part.
    return Splits(parts, arrival_counters(like, 1 + tiles), tl.constexpr(1 + 16 * threads // elements))


def new_total(like: Tensor, parts: int, counters: Tensor | None = None) -> Total:
    """For a launch on the device of `like`, with its `arrival_counters` if it has some already."""
    out, partial = like.new_empty((), dtype=torch.float32), like.new_empty(parts, dtype=torch.float32)
    return Total(out, partial, arrival_counters(like, 1) if counters is None else counters)


def value_of(total: Total | None, like: Tensor) -> Tensor:
    """The sum; without an element if there is none."""
    return like.new_empty(0, dtype=torch.float32) if total is None else total.out


@triton.jit
def sum_in_order(total, value, part, parts):
    """The total of the programs' values, added in the order of their parts, whichever program comes last."""
    tl.store(total.parts + part, value)
    arrived = tl.atomic_add(total.counter, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        sums = tl.zeros((PARTS,), tl.float32)
        for begin in range(0, parts, PARTS):
            each = begin + tl.arange(0, PARTS)
            # From the L2 cache, where the other programs' stores are.
            sums += tl.load(total.parts + each, mask=each < parts, other=0.0, cache_modifier=".cg")
        tl.store(total.out, tl.sum(sums))
        tl.store(total.counter, 0)


@triton.jit
def _part_offsets(part):
    """Of a tile's elements in a block of its own: the same for all sizes of the sum, and known to the compiler."""
    ROWS: tl.constexpr = part.shape[0]
    COLUMNS: tl.constexpr = part.shape[1]
    return tl.arange(0, ROWS)[:, None] + tl.arange(0, COLUMNS)[None, :] * ROWS


@triton.jit
def store_part(part, splits, split, tile, tiles):
    """Puts a split's part of a tile where the program that adds them up finds it."""
    index = (split.to(tl.int64) * tiles + tile) * part.numel
    tl.store(splits.parts + index + _part_offsets(part), part)


@triton.jit
def arrive_last(counter, number):
    """Whether this is the last of the `number` programs that arrive. It sees what they all stored before."""
    # One thread announces what all of them have stored. This barrier orders their stores before its release; the one
    # that gives its result to all threads orders its acquire before their loads.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == number - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def add_parts(own, splits, split, number, tile, tiles):
    """The sum of a tile's parts in the order of their splits, of which the program has its own."""
    parts_ptr = splits.parts + tile.to(tl.int64) * own.numel
    offsets = _part_offsets(own)
    total = tl.zeros_like(own)
    for first in range(0, number, splits.AT_ONCE):
        parts = ()
        for i in tl.static_range(splits.AT_ONCE):
            others = (first + i < number) & (first + i != split)
            # From the L2 cache, where the other programs' stores are.
            parts += (tl.load(parts_ptr + offsets, mask=others, other=own, cache_modifier=".cg"),)
            parts_ptr += tl.cast(tiles, tl.int64) * own.numel
        for i in tl.static_range(splits.AT_ONCE):
            total += parts[i] if splits.AT_ONCE == 1 else tl.where(first + i < number, parts[i], 0.0)
    return total

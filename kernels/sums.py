"""How partial sums become one: over the programs of a launch, over the splits of a product.

Always in the same order, so that a run repeats bit for bit.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements that a program of the second stage adds up
PARTS = tl.constexpr(1024)  # of a sum over programs, added at once

_counters: dict[torch.device, Tensor] = {}  # see `arrival_counter`


class Total(NamedTuple):
    """One number that the programs of a launch add up: where it goes, where their parts go, how many are there."""

    out: Any  # () fp32
    parts: Any  # (parts,) fp32
    counter: Any  # () int32, zero


def arrival_counter(like: Tensor) -> Tensor:
    """A zero on the device for `sum_in_order`, which leaves it a zero again: one launch less than a new one each time.

    Kernels of the default stream run one after another and share one, kept for good. On another stream each launch gets
    its own: a captured graph's replay may run beside other kernels, and memory of a graph's pool must not be kept.
    """
    if like.is_cuda and torch.cuda.current_stream(like.device).cuda_stream != 0:
        return like.new_zeros((), dtype=torch.int32)
    if like.device not in _counters:
        _counters[like.device] = like.new_zeros((), dtype=torch.int32)
    return _counters[like.device]


def new_total(like: Tensor, parts: int) -> Total:
    """For a launch on the device of `like`."""
    out, partial = like.new_empty((), dtype=torch.float32), like.new_empty(parts, dtype=torch.float32)
    return Total(out, partial, arrival_counter(like))


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
def _reduce_kernel(
    out_ptr,  # (elements,)
    partial_ptr,  # (SPLITS, elements) fp32
    elements,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sum of the partial results. Grid: (cdiv(elements, BLOCK),)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = offsets < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + tl.cast(elements, tl.int64) * split + offsets, mask=in_bounds, other=0.0)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=in_bounds)


def partial_results(out: Tensor, splits: int) -> Tensor:
    """Where the splits put their results: in `out` itself if there is one."""
    return out if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32)


def reduce(out: Tensor, partial: Tensor, splits: int) -> Tensor:
    """Adds the partial results into `out`."""
    if splits > 1:
        _reduce_kernel[(triton.cdiv(out.numel(), BLOCK),)](out, partial, out.numel(), SPLITS=splits, BLOCK=BLOCK)
    return out

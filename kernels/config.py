"""Launch configurations: which tile a kernel works on, chosen by a pure function of the problem.

The table of the matrix kernels is modelled, not yet measured: tiles whose code keeps the budgets of `python -m
bench.audit`, and single passes up to the batch where that model has sampling once and the library's product overtake.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton

Kernel = Literal["forward", "backward_input", "backward_weight"]


@dataclass(frozen=True)
class TileConfig:
    """An elementwise pass over (N, K) parameters: the rows and columns of one program and its warps."""

    block_n: int
    block_k: int
    num_warps: int = 1


@dataclass(frozen=True)
class MatmulConfig:
    """A kernel with a matrix product over M batch rows, N outputs and K inputs.

    Attributes:
        block_m, block_n, block_k: the tile of one program, powers of two of at least 16 (tl.dot's smallest).
        num_warps, num_stages: warps per program, depth of the load pipeline.
        unroll: tiles per iteration of the main loop.
        splits: parts of the product's sum, worked on by different programs and added in their order.
        single_pass: sample inside the product; otherwise the weights are sampled once to memory and the library
            multiplies, because in-product sampling repeats the noise for every tile of batch rows. Of the gradients of
            mu and rho: in the product's epilogue; otherwise in a pass after the library's product.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    unroll: int = 1
    splits: int = 1
    single_pass: bool = True


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def select_tile_config(shape: tuple[int, ...]) -> TileConfig:
    """The tile for an elementwise pass over parameters of `shape` (N, K)."""
    rows, columns = shape
    # One warp and 16 columns for each of its threads: fewest instructions per weight, and no shared memory for sums.
    block_k = min(512, max(16, power_of_two(columns)))
    # Long columns share more of Philox, but some 2000 programs are what a device holds at once.
    shared = rows * triton.cdiv(columns, block_k) // 2000
    return TileConfig(block_n=min(32, max(1, power_of_two(shared + 1) // 2)), block_k=block_k)


SAMPLE_ONCE = MatmulConfig(128, 64, 64, single_pass=False)

# Batch rows up to which a configuration is taken; beyond the last the weights are sampled once. By kernel, arithmetic
# of the product ("16-bit" operands, "tf32", or "ieee" fp32 without tensor cores), and the first compute capability.
_Rows = dict[int, MatmulConfig]
_TABLE: dict[tuple[Kernel, str], dict[int, _Rows]] = {
    ("forward", "16-bit"): {
        80: {rows: MatmulConfig(min(rows, 128), 64, 64) for rows in (16, 32, 64, 128, 256)},
        90: {rows: MatmulConfig(rows, 64, 64) for rows in (16, 32, 64, 128)}
        | {512: MatmulConfig(256, 64, 32, unroll=2)},
        100: {rows: MatmulConfig(min(rows, 256), 64, 64) for rows in (16, 32, 64, 128, 256, 512)},
    },
    ("forward", "tf32"): {80: {rows: MatmulConfig(min(rows, 64), 64, 64) for rows in (16, 32, 64, 128)}},
    ("forward", "ieee"): {80: {rows: MatmulConfig(rows, 64, 32) for rows in (16, 32)}},
    ("backward_input", "16-bit"): {
        80: {rows: MatmulConfig(min(rows, 128), 64, 64) for rows in (16, 32, 64, 128, 256)},
        90: {rows: MatmulConfig(min(rows, 256), 64, 64) for rows in (16, 32, 64, 128, 256, 512)},
        100: {rows: MatmulConfig(rows, 64, 64) for rows in (16, 32, 64, 128)}
        | {512: MatmulConfig(256, 64, 64, num_warps=8)},
    },
    ("backward_input", "tf32"): {80: {rows: MatmulConfig(min(rows, 64), 32, 64) for rows in (16, 32, 64, 128)}},
    ("backward_input", "ieee"): {80: {rows: MatmulConfig(rows, 32, 64) for rows in (16, 32)}},
}
# Of dmu and drho the batch is only the length of the sum: one tile for all, and a smaller one for fewer weights.
_WEIGHT_TABLE = {
    "16-bit": MatmulConfig(64, 128, 128, num_warps=8, num_stages=3),
    "tf32": MatmulConfig(32, 128, 128, num_warps=8),
    "ieee": MatmulConfig(16, 128, 128, num_warps=8),
}
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


def select_config(
    kernel: Kernel,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    capability: tuple[int, int],
    allow_tf32: bool = False,
) -> MatmulConfig:
    """The configuration of a matrix kernel.

    Args:
        kernel: which one.
        shape: (M, N, K), the batch rows, out_features and in_features.
        dtype: of x, hence of the product's operands.
        capability: of the device, such as (9, 0).
        allow_tf32: whether products of fp32 may round their operands.
    """
    M, N, K = shape
    arithmetic = "16-bit" if dtype.itemsize == 2 else "tf32" if allow_tf32 else "ieee"
    architecture = 10 * capability[0] + capability[1]
    multiprocessors = _MULTIPROCESSORS[_latest(_MULTIPROCESSORS, architecture)]
    if kernel == "backward_weight":
        config = _WEIGHT_TABLE[arithmetic]
        if triton.cdiv(N, 128) * triton.cdiv(K, 128) < multiprocessors:
            config = replace(config, block_n=64, num_warps=4)
        return config if fits(kernel, config, shape) else SAMPLE_ONCE
    architectures = _TABLE[kernel, arithmetic]
    table = architectures[_latest(architectures, architecture)]
    config = next((config for rows, config in table.items() if rows >= M), SAMPLE_ONCE)
    if not config.single_pass or not fits(kernel, config, shape):
        return SAMPLE_ONCE
    # Two programs per multiprocessor hide each other's waits; a split has four tiles or more, for the pipeline.
    across, along = (N, K) if kernel == "forward" else (K, N)
    block_across, block_along = (
        (config.block_n, config.block_k) if kernel == "forward" else (config.block_k, config.block_n)
    )
    programs = triton.cdiv(across, block_across) * triton.cdiv(M, config.block_m)
    splits = min(2 * multiprocessors // max(programs, 1), triton.cdiv(along, block_along) // 4)
    return replace(config, splits=max(1, splits))


def fits(kernel: Kernel, config: MatmulConfig, shape: tuple[int, int, int]) -> bool:
    """Whether a single pass can work on (M, N, K): in whole quads of columns, with tiles that can move back to fit."""
    _, N, K = shape
    if 0 in shape or K % 4 != 0:
        return False
    if kernel == "backward_input":
        return config.block_k <= K
    if kernel == "backward_weight":
        return config.block_n <= N and config.block_k <= K
    return True


def _latest(table: Mapping[int, object], architecture: int) -> int:
    """The table's newest architecture that is not newer than `architecture`, or its oldest."""
    return max((known for known in table if known <= architecture), default=min(table))

"""Which configuration a launch takes: a pure function of the problem and of the device's compute capability."""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
import triton

from fusedbayes.kernels.config import Kernel, MatmulConfig, TileConfig, fits
from fusedbayes.kernels.table import TABLE

Value = TypeVar("Value")

SAMPLE_ONCE = MatmulConfig(128, 64, 64, single_pass=False)
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of an A100, an H100 or H200, a B200


def select_tile_config(shape: tuple[int, ...]) -> TileConfig:
    """The tile for an elementwise pass over parameters of `shape` (N, K)."""
    rows, columns = shape
    # One warp and 16 columns for each of its threads: fewest instructions per weight, and no shared memory for sums.
    block_k = min(512, max(16, _power_of_two(columns)))
    # Long columns share more of Philox, but some 2000 programs are what a device holds at once.
    shared = rows * triton.cdiv(columns, block_k) // 2000
    return TileConfig(block_n=min(32, max(1, _power_of_two(shared + 1) // 2)), block_k=block_k)


@functools.lru_cache(maxsize=1024)  # asked at every launch
def select_config(
    kernel: Kernel,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    capability: tuple[int, int],
    allow_tf32: bool = False,
    num_samples: int = 1,
    estimator: str = "shared",
) -> MatmulConfig:
    """The configuration of a matrix kernel.

    Args:
        kernel: which one.
        shape: (M, N, K), the batch rows, out_features and in_features.
        dtype: of x, hence of the product's operands.
        capability: of the device, such as (9, 0).
        allow_tf32: whether products of fp32 may round their operands.
        num_samples: Monte Carlo samples, each of M rows.
        estimator: whose products these are.
    """
    M, N, K = shape
    pair = estimator != "shared"
    arithmetic = "16-bit" if dtype.itemsize == 2 else "tf32" if allow_tf32 else "ieee"
    architecture = 10 * capability[0] + capability[1]
    batches = _latest(
        {known: rows for (*which, known), rows in TABLE.items() if which == [kernel, arithmetic]}, architecture
    )
    # The results of a pair of products take as many registers as that of one with twice the batch.
    config = next((config for rows, config in batches.items() if rows >= (2 * M if pair else M)), SAMPLE_ONCE)
    if kernel == "backward_weight" and num_samples > 1:
        # Two sums beside the product, which have to last from sample to sample.
        config = replace(config, block_n=config.block_n // 2, block_k=config.block_k // 2)
    elif kernel == "backward_weight" and pair:
        config = replace(config, block_n=config.block_n // 2)
    elif pair:
        config = _of_two_products(config, kernel, architecture)
        masked = kernel == "backward_input" and N % config.block_n != 0
        if kernel == "backward_input" and (config.block_m >= 64 or (masked and config.block_m >= 32)):
            # Fewer columns would not fill the tensor cores' M side.
            config = replace(config, block_n=32, num_warps=4)
        elif estimator == "flipout" and config.block_m >= 64:
            # The signs of x need registers too.
            config = replace(config, block_k=32, unroll=1)
    elif num_samples > 1 and kernel == "forward":
        config = _with_samples(config, K, num_samples, arithmetic, architecture)
    crowded = architecture >= 100 or (pair and architecture < 90)
    if crowded and kernel == "forward" and config.block_m == 64 and K % config.block_k != 0:
        # With priors that are loaded a masked last step of 64 columns would spill, and one of 32 with two stages.
        config = replace(config, block_k=32, num_stages=3)
    multiprocessors = _latest(MULTIPROCESSORS, architecture)
    few_tiles = triton.cdiv(N, config.block_n) * triton.cdiv(K, config.block_k) < multiprocessors
    if kernel == "backward_weight" and few_tiles and num_samples == 1 and M % config.block_m == 0:
        # Half the tile for half the threads: more programs for a small layer. The masked step of a batch that the tile
        # does not divide would weigh too much on it.
        config = replace(config, block_n=config.block_n // 2, num_warps=config.num_warps // 2, max_registers=None)
    # The masked last step of a sum that the tile does not divide costs registers and instructions, of which a tile with
    # many batch rows has none to spare: it would spill, or be over its budget.
    remainder = {"forward": K % config.block_k, "backward_input": N % config.block_n, "backward_weight": 0}[kernel]
    if not config.single_pass or (config.block_m >= 128 and remainder != 0) or not fits(kernel, config, shape):
        return SAMPLE_ONCE
    config = replace(config, splits=_splits(kernel, config, shape, multiprocessors, num_samples))
    if kernel == "forward" and config.block_k > 64:
        programs = triton.cdiv(N, config.block_n) * config.splits
        if K % config.block_k != 0 or programs < multiprocessors // 2:
            # A small layer is split more often in narrow tiles, and these have a cheaper masked step.
            config = replace(config, block_k=64, num_warps=4)
            config = replace(config, splits=_splits(kernel, config, shape, multiprocessors, num_samples))
    return config


def _of_two_products(config: MatmulConfig, kernel: Kernel, architecture: int) -> MatmulConfig:
    """Half the batch rows; of a tile for 8 warps what 4 warps have the registers for, so that two programs fit."""
    block_m = max(16, config.block_m // 2)
    if config.num_warps == 4 or not config.single_pass:
        return replace(config, block_m=block_m)
    config = replace(config, block_m=block_m, block_k=64, num_warps=4, num_stages=3 if block_m < 64 else 2)
    if kernel == "forward" and block_m >= 128 and architecture < 100:
        return replace(config, block_k=32, unroll=2)
    return config


def _with_samples(config: MatmulConfig, K: int, num_samples: int, arithmetic: str, architecture: int) -> MatmulConfig:
    """A program that draws several Monte Carlo samples from one mu and sigma, if their results have registers.

    Eight samples of 16 batch rows have; sm_100, whose products write elsewhere, has room for the operands of four. A
    masked last step takes half of it. A tile of 32 columns is what is left for the weights.
    """
    samples = min(128 // config.block_m, 8 if architecture < 100 else 4)
    if K % 32 != 0:
        samples //= 2
    samples = min(samples, 1 << (num_samples - 1).bit_length())
    if arithmetic != "16-bit" or not config.single_pass or samples < 2:
        return config
    return replace(config, samples=samples, block_k=32, num_warps=4, num_stages=3)


def _splits(
    kernel: Kernel, config: MatmulConfig, shape: tuple[int, int, int], multiprocessors: int, num_samples: int
) -> int:
    """Parts of the sum over inputs (forward) or outputs (dX), so that enough programs share the device.

    Two programs of 4 warps per multiprocessor hide each other's waits; of 8 warps there is room for one. A part has
    four tiles or more, for the pipeline.
    """
    M, N, K = shape
    if kernel == "backward_weight":
        return 1
    result, terms = (
        (N / config.block_n, K / config.block_k) if kernel == "forward" else (K / config.block_k, N / config.block_n)
    )
    batches = triton.cdiv(num_samples, config.samples) * triton.cdiv(M, config.block_m)
    programs = math.ceil(result) * batches
    resident = multiprocessors * (2 if config.num_warps == 4 else 1)
    return max(1, min(resident // programs, math.ceil(terms) // 4))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def _latest(table: Mapping[int, Value], architecture: int) -> Value:
    """The entry of the newest architecture that is not newer than `architecture`, or of the oldest."""
    return table[max((known for known in table if known <= architecture), default=min(table))]

"""Launch configurations: which tile a kernel works on, chosen by a pure function of the problem.

The choices below are heuristics from compiling for sm_80 and sm_90, not yet measurements.
"""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class TileConfig:
    """An elementwise pass over (N, K) parameters: the tile of one program and its warps."""

    block_n: int
    block_k: int
    num_warps: int = 4


@dataclass(frozen=True)
class MatmulConfig:
    """A kernel with a matrix product over M batch rows, N outputs and K inputs.

    Attributes:
        block_m, block_n, block_k: the tile of one program, powers of two of at least 16 (tl.dot's smallest).
        num_warps, num_stages: warps per program, depth of the load pipeline.
        single_pass: sample inside the product; otherwise the weights are sampled once to memory and the library
            multiplies, because in-product sampling would repeat the noise for every tile of batch rows.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    single_pass: bool = True


def select_tile_config(shape: tuple[int, ...]) -> TileConfig:
    """The tile for an elementwise pass over parameters of `shape` (N, K)."""
    rows, _ = shape
    if rows == 1:  # a bias
        return TileConfig(block_n=1, block_k=1024)
    return TileConfig(block_n=16, block_k=128)


def select_config(
    kernel: Literal["forward", "backward_input", "backward_weight"],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> MatmulConfig:
    """The configuration of a matrix kernel.

    Args:
        kernel: which one.
        shape: (M, N, K), the batch rows, out_features and in_features.
        dtype: of x, hence of the product's operands.
        capability: of the device, such as (9, 0).
    """
    rows, _, _ = shape
    stages = 3 if capability >= (9, 0) and dtype.itemsize == 2 else 2
    if kernel == "backward_weight":
        # The epilogue holds mu, rho, eps and both gradients of the tile in registers: 64 x 64 does not spill.
        return MatmulConfig(block_m=32, block_n=64, block_k=64, num_warps=8, num_stages=stages)
    # One tile holds the whole batch as long as it can: a second tile of rows would draw the same weights again.
    block_m = min(128, max(16, 1 << (rows - 1).bit_length())) if rows > 0 else 16
    single_pass = rows <= 256
    if kernel == "forward":
        return MatmulConfig(block_m, block_n=64, block_k=32, num_warps=8, num_stages=stages, single_pass=single_pass)
    return MatmulConfig(block_m, block_n=32, block_k=64, num_warps=8, num_stages=stages, single_pass=single_pass)

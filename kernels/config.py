"""Launch configurations as values: which tile a kernel works on, and whether it can."""

from dataclasses import dataclass
from typing import Literal

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
        unroll: tiles per iteration of the forward's main loop.
        samples: Monte Carlo samples of the forward that one program draws, from one mu and sigma.
        splits: parts of the product's sum, worked on by different programs and added in their order. Not of dmu and
            drho, which have programs enough.
        single_pass: sample inside the product; otherwise the weights are sampled once to memory and the library
            multiplies, because in-product sampling repeats the noise for every tile of batch rows. Of the gradients of
            mu and rho: in the product's epilogue; otherwise in a pass after the library's product.
        max_registers: of a thread, so that two programs of 8 warps share a multiprocessor; None leaves it to the
            compiler. Of dmu and drho only.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    unroll: int = 1
    samples: int = 1
    splits: int = 1
    single_pass: bool = True
    max_registers: int | None = None


def fits(kernel: Kernel, config: MatmulConfig, shape: tuple[int, int, int]) -> bool:
    """Whether a single pass can work on (M, N, K): in whole quads of columns, with tiles that can move back to fit."""
    _, N, K = shape
    # Offsets within two tiles of weights, and within a tile of the results, have to fit 32 bits.
    width = {"forward": N, "backward_input": K, "backward_weight": 0}[kernel]
    if 0 in shape or K % 4 != 0 or max(2 * config.block_n * K, config.block_m * width) >= 2**31:
        return False
    if kernel == "backward_input":
        return config.block_k <= K
    if kernel == "backward_weight":
        return config.block_n <= N and config.block_k <= K
    return True

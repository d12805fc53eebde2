"""One step of the forward product: a tile of mu and rho, the products of an estimator with it, its part of the KL."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.config import MatmulConfig
from fusedbayes.kernels.fragments import as_operand, block_columns, fragment_columns, normal_blocks
from fusedbayes.kernels.gaussian import sigma_from_rho
from fusedbayes.kernels.launch import capability
from fusedbayes.kernels.math import anew, once
from fusedbayes.kernels.noise import FLIPOUT_INPUT, ROOT, negative_tile, normal_tile
from fusedbayes.kernels.parameter import load_elements
from fusedbayes.kernels.tile_kl import add_kl


class Tiles(NamedTuple):
    """What the steps of a program share.

    Attributes:
        x_ptr, mu_ptr, rho_ptr: at the program's first row; x_offsets (BLOCK_K, BLOCK_M), weight_offsets (BLOCK_N,
            BLOCK_K), or (BLOCK_K / 16, BLOCK_N, 16) for a tile in fragments: of the first tile of columns. If x is the
            product's first operand: at each of the rows, (BLOCK_M, 1) and (BLOCK_N, 1), and x_offsets (1, BLOCK_K).
        stride_xs: between the batches of two Monte Carlo samples.
        first, last: of the Monte Carlo samples, the program's first one and the last of all, counted from `noise`'s.
        noise: of the first tile of columns.
        batch: rows of x within their sample (BLOCK_M,).
        first_quad: of all columns.
        charge: of `open_charge`, or None without KL.
    """

    x_ptr: Any
    x_offsets: Any
    stride_xk: Any
    stride_xs: Any
    first: Any
    last: Any
    mu_ptr: Any
    rho_ptr: Any
    weight_offsets: Any
    noise: Any
    batch: Any
    first_quad: Any
    charge: Any
    K: Any


def x_first(config: MatmulConfig, estimator: str, x: Tensor) -> bool:
    """Whether the product is x W^T, in tiles of 8 warps on sm_90, and not W x^T.

    The tensor cores take 64 rows of the first operand from the registers of four warps, and the second from shared
    memory. Were W the first one, both halves of the warps would load all of it. Fewer than 64 rows of x would be
    padded. The interpreter is to go this way too.
    """
    wide = config.num_warps == 8 and config.block_m >= 64
    return wide and estimator == "shared" and x.dtype.itemsize == 2 and capability(x)[0] in (9, 0)


@triton.jit
def _dot(weight, x, product, OPERANDS: tl.constexpr, DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """Product (BLOCK_N, BLOCK_M) + weight x, both rounded to OPERANDS; of x (1, BLOCK_M, BLOCK_K) its transpose."""
    weight, x = weight.to(OPERANDS).to(DOT_DTYPE), x.to(OPERANDS).to(DOT_DTYPE)
    if len(x.shape) == 3:
        # Loaded as a matrix, x would be multiplied from shared memory as well: one more step of it would be kept there,
        # and what is copied next would wait for one more barrier.
        x = tl.reshape(x, (x.shape[1], x.shape[2]))
        product = tl.dot(x, tl.trans(weight), product, input_precision=INPUT_PRECISION)
    else:
        product = tl.dot(weight, x, product, input_precision=INPUT_PRECISION)
    return product


@triton.jit
def step(
    products,
    kl_sums,
    tile_k,
    tiles,
    MASKED: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The products (BLOCK_N, BLOCK_M), or transposed, and the KL's sums with one more tile of columns.

    "shared": W x for the W of each Monte Carlo sample. "local": mu x and sigma^2 x^2. "flipout": mu x and
    (sigma eps) (r x).
    """
    X_FIRST: tl.constexpr = tiles.x_ptr.type.is_block()
    BLOCK_K: tl.constexpr = tiles.x_offsets.shape[1 if X_FIRST else 0]
    IN_FRAGMENTS: tl.constexpr = len(tiles.weight_offsets.shape) == 3
    X_DTYPE: tl.constexpr = tiles.x_ptr.dtype.scalar.element_ty
    noise = tiles.noise
    first = tile_k * BLOCK_K
    # A 32-bit sum per four weights and a wide multiply-add per address: cheaper than 64-bit offsets.
    offsets = tiles.weight_offsets + first
    exist, x_exist, quads_exist = None, None, None
    if MASKED:
        columns = first + tl.arange(0, BLOCK_K)
        exist, x_exist = (columns < tiles.K)[None, :], (columns < tiles.K)[:, None]
        if IN_FRAGMENTS:
            exist = first + block_columns(BLOCK_K) < tiles.K
            x_exist = (first + fragment_columns(BLOCK_K) < tiles.K)[:, None]
        if X_FIRST:
            x_exist = exist[None, :, :]
        quads_exist = (first + 4 * tl.arange(0, BLOCK_K // 4) < tiles.K)[None, :]
    in_rows = offsets
    if X_FIRST:
        in_rows = (first + tl.arange(0, BLOCK_K))[None, :]
    mu = load_elements(tiles.mu_ptr, in_rows, exist, 0.0).to(tl.float32)
    sigma = sigma_from_rho(load_elements(tiles.rho_ptr, in_rows, exist, 0.0).to(tl.float32))
    quads = noise.columns + tile_k * (BLOCK_K // 4)
    sums = ()
    if ESTIMATOR == "shared":
        scale = sigma
        if len(products) > 1:
            scale = sigma * ROOT
        for i in tl.static_range(len(products)):
            # What is beyond the last sample repeats it: drawn, multiplied, and stored alike.
            sample = tl.minimum(tiles.first + i, tiles.last)
            if X_FIRST:
                x_ptr = (tiles.x_ptr + sample * tiles.stride_xs)[None, :, :]
                x_offsets = (tiles.x_offsets + first * tiles.stride_xk)[None, :, :]
            elif IN_FRAGMENTS:
                # As with mu and rho: the loads are small, and a 64-bit pointer of each sample would have to move on.
                x_ptr, x_offsets = tiles.x_ptr + sample * tiles.stride_xs, tiles.x_offsets + first * tiles.stride_xk
            else:
                x_ptr = tiles.x_ptr + tl.cast(first, tl.int64) * tiles.stride_xk + sample * tiles.stride_xs
                x_offsets = tiles.x_offsets
            x = load_elements(x_ptr, x_offsets, x_exist, 0.0)
            index = noise.sample + sample
            if len(products) > 1:
                index = anew(index, tile_k)
            if IN_FRAGMENTS:
                eps = normal_blocks(noise.seed, noise.rows, quads, index, noise.stream, True)
                weight = as_operand(mu + scale * eps)
            else:
                weight = mu + scale * normal_tile(noise.seed, noise.rows, quads, index, noise.stream, len(products) > 1)
            sums += (_dot(weight, x, products[i], X_DTYPE, DOT_DTYPE, INPUT_PRECISION),)
    else:
        x_ptr = tiles.x_ptr + tl.cast(first, tl.int64) * tiles.stride_xk + tiles.first * tiles.stride_xs
        x = load_elements(x_ptr, tiles.x_offsets, x_exist, 0.0)
        mean = _dot(mu, x, products[0], X_DTYPE, DOT_DTYPE, INPUT_PRECISION)
        wide = x.to(tl.float32)  # the interpreter would negate the bits of a bf16
        if ESTIMATOR == "local":
            if tiles.charge is not None:
                sigma = once(sigma, tile_k)
            # Squares of fp16 would overflow and underflow.
            SQUARES: tl.constexpr = tl.bfloat16 if tl.float16 == X_DTYPE else X_DTYPE
            SQUARES_DOT: tl.constexpr = DOT_DTYPE if tl.float32 == DOT_DTYPE else SQUARES
            second = _dot(sigma * sigma, wide * wide, products[1], SQUARES, SQUARES_DOT, INPUT_PRECISION)
        else:
            sample = noise.sample + tiles.first
            perturbation = sigma * normal_tile(noise.seed, noise.rows, quads, sample, noise.stream)
            quad = tiles.first_quad + tile_k * (BLOCK_K // 4)
            stream = tl.cast(noise.stream, tl.uint32) + FLIPOUT_INPUT
            negative = negative_tile(noise.seed, quad, tiles.batch, sample, stream, BLOCK_K)
            wide = tl.where(negative, -wide, wide)
            second = _dot(perturbation, wide, products[1], X_DTYPE, DOT_DTYPE, INPUT_PRECISION)
        sums = (mean, second)
    if tiles.charge is not None:
        kl_sums = add_kl(kl_sums, tiles.charge, mu, sigma, offsets, exist, quads_exist)
    return sums, kl_sums

"""A tile of dmu and drho: the steps of its product over the batch, and how it is worked up and stored."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedbayes.kernels.gaussian import gaussian_gradients, sigma_from_rho
from fusedbayes.kernels.noise import Noise, normal_tile
from fusedbayes.kernels.parameter import load_elements, open_prior, prior_at


class BatchTiles(NamedTuple):
    """The operands of a product over the batch.

    Pointers are at the tile's first row and column, offsets are those in the first tile of batch rows.
    """

    grad_y_ptr: Any
    grad_y_offsets: Any  # (BLOCK_N, BLOCK_M)
    stride_gm: Any
    x_ptr: Any
    x_offsets: Any  # (BLOCK_M, BLOCK_K)
    stride_xm: Any
    M: Any


class WeightTile(NamedTuple):
    """Where in the weight a tile is.

    Attributes:
        start: its first element; in_tile: its rows, (BLOCK_N,), counted from there.
        noise: `Noise` of its rows, with the quad of its first column.
    """

    start: Any
    in_tile: Any
    noise: Any
    K: Any


@triton.jit
def batch_step(product, tile_m, tiles, MASKED: tl.constexpr, DOT_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """One tile of batch rows: multiply, add to the product (BLOCK_N, BLOCK_K)."""
    BLOCK_M: tl.constexpr = tiles.x_offsets.shape[0]
    # The second operands of fp16 may be bf16.
    OPERANDS: tl.constexpr = DOT_DTYPE if tl.float32 == DOT_DTYPE else tiles.x_ptr.dtype.element_ty
    first = tl.cast(tile_m * BLOCK_M, tl.int64)
    exist, x_exist = None, None
    if MASKED:
        batch = first + tl.arange(0, BLOCK_M)
        exist, x_exist = (batch < tiles.M)[None, :], (batch < tiles.M)[:, None]
    grad_y = load_elements(tiles.grad_y_ptr + first * tiles.stride_gm, tiles.grad_y_offsets, exist, 0.0)
    x = load_elements(tiles.x_ptr + first * tiles.stride_xm, tiles.x_offsets, x_exist, 0.0)
    return tl.dot(grad_y.to(OPERANDS), x.to(OPERANDS), product, input_precision=INPUT_PRECISION)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns: registers of the tensor cores' layout, so nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile):
    """Four pieces of the columns: the whole tile's mu, rho, eps and gradients at once would not fit the registers."""
    left, right = _halves(tile)
    return _halves(left) + _halves(right)


@triton.jit
def piece_noise(tile, i, PIECE: tl.constexpr):
    """The noise of the tile's i-th piece of PIECE columns."""
    noise = tile.noise
    quads = noise.columns + i * (PIECE // 4) + tl.arange(0, PIECE // 4)
    return Noise(noise.seed, noise.rows, quads, noise.sample, noise.stream)


@triton.jit
def store_tile(
    grads,  # `Gradients` (N, K)
    grad_mu,  # four pieces, fp32: what the output says of mu
    grad_sigma,  # likewise of sigma, before the factor
    grad_kl_ptr,  # () fp32, or None
    weight,  # a `Gaussian` (N, K)
    tile,  # `WeightTile`
    FACTOR: tl.constexpr,  # of grad_sigma: "eps", "2 sigma" or "1"
):
    """dmu and drho of `gaussian_gradients`, piece by piece."""
    WITH_KL: tl.constexpr = grad_kl_ptr is not None
    PIECE: tl.constexpr = grad_mu[0].shape[1]
    grad_kl, prior = 0.0, (0.0, 1.0)
    if WITH_KL:
        grad_kl, prior = tl.load(grad_kl_ptr), open_prior(weight, 0)
    for i in tl.static_range(4):
        offsets = tile.start + (tile.in_tile[:, None] * tile.K + (tl.arange(0, PIECE) + i * PIECE)[None, :])
        factor = 1.0
        if FACTOR == "eps":
            factor = normal_tile(*piece_noise(tile, i, PIECE))
        mu = tl.load(weight.mu + offsets).to(tl.float32)
        rho = tl.load(weight.rho + offsets).to(tl.float32)
        if FACTOR == "2 sigma":
            factor = 2.0 * sigma_from_rho(rho)
        prior_mu, prior_sigma = prior
        if WITH_KL:
            prior_mu, prior_sigma = prior_at(prior, offsets, None)
        dmu, drho = gaussian_gradients(
            grad_mu[i], grad_sigma[i] * factor, grad_kl, mu, rho, prior_mu, prior_sigma, WITH_KL
        )
        tl.store(grads.mu + offsets, dmu.to(grads.mu.dtype.element_ty))
        tl.store(grads.rho + offsets, drho.to(grads.rho.dtype.element_ty))

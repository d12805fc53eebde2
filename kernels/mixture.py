"""The KL from a scale mixture of two Normals, estimated by one sample: a pass over (mu, rho), built like `sample`'s."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedbayes.kernels.config import TileConfig
from fusedbayes.kernels.gaussian import sigma_and_slope, sigma_from_rho
from fusedbayes.kernels.launch import NOT_SPECIALIZED
from fusedbayes.kernels.math import LN_2, LOG2_E, absolute, exp2, log2, reciprocal
from fusedbayes.kernels.noise import load_key
from fusedbayes.kernels.parameter import gaussian, new_gradients
from fusedbayes.kernels.quads import (
    load_quads,
    normal_quads,
    quad_columns,
    store_quads,
    sum_difference_of_squares_of_quads,
    sum_quads,
)
from fusedbayes.kernels.sample import programs_of, row_tile, tile_constants
from fusedbayes.kernels.select import select_tile_config
from fusedbayes.kernels.sums import new_total, sum_in_order, value_of


class Mixture(NamedTuple):
    """pi N(0, sigma_1^2) + (1 - pi) N(0, sigma_2^2), each a single number."""

    pi: Any
    sigma_1: Any
    sigma_2: Any


@triton.jit
def _components(mixture):
    """The wide and the narrow component's deviation, and their shares."""
    share, first, second = (
        tl.load(mixture.pi).to(tl.float32),
        tl.load(mixture.sigma_1).to(tl.float32),
        tl.load(mixture.sigma_2).to(tl.float32),
    )
    if share == 0.0 or share == 1.0:  # as it may be in 16 bits: two halves of the one component
        if share == 0.0:
            first = second
        second, share = first, 0.5
    if first < second:
        first, second, share = second, first, 1.0 - share
    return first, second, share, 1.0 - share


@triton.jit
def _ratio(components):
    """What `_weigh` takes: log odds of the wide component at 0 to base 2, and two factors of w."""
    wide, narrow, wide_share, narrow_share = components
    log_odds = tl.log2(wide_share) - tl.log2(narrow_share) + (tl.log2(narrow) - tl.log2(wide))
    return log_odds, (1.0 / narrow - 1.0 / wide) * (0.5 * LOG2_E), 1.0 / narrow + 1.0 / wide


@triton.jit
def _weigh(w, ratio):
    """d = log2 of the wide component's density over the narrow one's at w, with their shares, and 2^-|d|.

    The difference of two squares as a product: it is a small number where both are large.
    """
    log_odds, difference, total = ratio
    d = (w * difference) * (w * total) + log_odds
    return d, exp2(-absolute(d))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _mixture_kl_kernel(
    kl,  # a `Total` with a part for each program
    weight,  # a `Gaussian` (N, K) without a prior
    mixture,  # a `Mixture`
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    N,
    K,
    row_offset,
    quad_offset,
    stream,
    COLUMN_SHIFT: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,  # 4 divides K, and COLUMN_SHIFT is 0
    EVEN: tl.constexpr,  # BLOCK_K divides K, and COLUMN_SHIFT is 0
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum of log q(w) - log p(w) for w = mu + softplus(rho) eps.

    With `_weigh`'s d and e for the wide component's deviation s and its share,
    (w^2 / s^2 - eps^2) / 2 - log(sigma (1 + e) share / s) - max(-d, 0) ln 2: nothing overflows before w does.

    Grid: (cdiv(N, BLOCK_N) * cdiv(K + COLUMN_SHIFT, BLOCK_K),).
    """
    if WHOLE_QUADS:
        K = K // 4 * 4  # for the compiler to see
    tile = tl.program_id(0)
    seed, sample = load_key(seed_ptr, sample_ptr)
    components = _components(mixture)
    ratio = _ratio(components)
    wide_inverse = 1.0 / components[0]
    # What the logarithm is where posterior and wide component are the same: see `gaussian.kl_centres`.
    centre = tl.log2(components[0]) - tl.log2(components[2])
    begin, end, column, quads = row_tile(tile, N, K, quad_offset, COLUMN_SHIFT, BLOCK_N, BLOCK_K)
    columns, exist = quad_columns(column, K, COLUMN_SHIFT, WHOLE_QUADS, EVEN, BLOCK_K)
    start = begin.to(tl.int64) * K + column
    mu_row, rho_row = weight.mu + start, weight.rho + start
    logarithms = tl.zeros((BLOCK_K // 4, 1), tl.float32)
    squares = logarithms
    for row in range(begin, end):
        mu = load_quads(mu_row, columns, exist, 0.0, WHOLE_QUADS)
        sigma = sigma_from_rho(load_quads(rho_row, columns, exist, 0.0, WHOLE_QUADS))
        eps = normal_quads(seed, quads, row_offset + row, sample, stream)
        w = mu + sigma * eps
        d, e = _weigh(w, ratio)
        logarithm = log2(sigma * e + sigma) + tl.maximum(-d, 0.0)
        scaled = w * wide_inverse
        if WHOLE_QUADS:
            logarithms += sum_quads(logarithm) - 4.0 * centre
            squares = sum_difference_of_squares_of_quads(scaled, eps, squares)
        else:
            logarithms += sum_quads(tl.where(exist, logarithm - centre, 0.0))
            squares += sum_quads(tl.where(exist, scaled * scaled - eps * eps, 0.0))
        mu_row += K
        rho_row += K
    if WHOLE_QUADS and not EVEN:
        quad_exists = column + 4 * tl.arange(0, BLOCK_K // 4)[:, None] < K
        logarithms, squares = tl.where(quad_exists, logarithms, 0.0), tl.where(quad_exists, squares, 0.0)
    sum_in_order(kl, 0.5 * tl.sum(squares) - LN_2 * tl.sum(logarithms), tile, tl.num_programs(0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _mixture_kl_backward_kernel(
    grads,  # `Gradients` (N, K) row-major
    grad_kl_ptr,  # () fp32
    weight,  # a `Gaussian` (N, K) without a prior
    mixture,  # a `Mixture`
    seed_ptr,  # () int64
    sample_ptr,  # () int64, or None for 0
    N,
    K,
    row_offset,
    quad_offset,
    stream,
    COLUMN_SHIFT: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,  # 4 divides K, and COLUMN_SHIFT is 0
    EVEN: tl.constexpr,  # BLOCK_K divides K, and COLUMN_SHIFT is 0
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dmu = g h and drho = g (h eps - 1 / sigma) sigmoid(rho), with eps drawn again.

    h = -d log p / dw, each component's w / s^2 times its share of the density at w; g = dL/dKL.

    Grid: as for `_mixture_kl_kernel`.
    """
    if WHOLE_QUADS:
        K = K // 4 * 4  # for the compiler to see
    seed, sample = load_key(seed_ptr, sample_ptr)
    grad_kl = tl.load(grad_kl_ptr).to(tl.float32)
    components = _components(mixture)
    ratio = _ratio(components)
    wide_inverse, narrow_inverse = 1.0 / components[0], 1.0 / components[1]
    wide_slope, narrow_slope = wide_inverse * wide_inverse, narrow_inverse * narrow_inverse
    begin, end, column, quads = row_tile(tl.program_id(0), N, K, quad_offset, COLUMN_SHIFT, BLOCK_N, BLOCK_K)
    columns, exist = quad_columns(column, K, COLUMN_SHIFT, WHOLE_QUADS, EVEN, BLOCK_K)
    start = begin.to(tl.int64) * K + column
    mu_row, rho_row = weight.mu + start, weight.rho + start
    grad_mu_row, grad_rho_row = grads.mu + start, grads.rho + start
    for row in range(begin, end):
        mu = load_quads(mu_row, columns, exist, 0.0, WHOLE_QUADS)
        rho = load_quads(rho_row, columns, exist, 0.0, WHOLE_QUADS)
        sigma, slope_over_sigma = sigma_and_slope(rho)
        eps = normal_quads(seed, quads, row_offset + row, sample, stream)
        deviation = sigma * eps
        w = mu + deviation
        d, e = _weigh(w, ratio)
        narrow_share = tl.where(d > 0.0, e, 1.0) * reciprocal(1.0 + e)
        # A sum of positive numbers: the narrow component's slope is the larger one.
        h = grad_kl * (w * ((narrow_slope - wide_slope) * narrow_share + wide_slope))
        store_quads(grad_mu_row, columns, h, exist, WHOLE_QUADS)
        store_quads(grad_rho_row, columns, (h * deviation - grad_kl) * slope_over_sigma, exist, WHOLE_QUADS)
        mu_row += K
        rho_row += K
        grad_mu_row += K
        grad_rho_row += K


def _arguments(
    parameter: tuple[Tensor, Tensor],
    mixture: tuple[Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor | None],
    address: Sequence[int],
) -> tuple[Any, ...]:
    """What both kernels take between their first arguments and the constants."""
    stream, row_offset, column_offset = address
    where = row_offset, column_offset // 4, stream
    return gaussian((*parameter, None, None)), Mixture(*mixture), *key, *parameter[0].shape, *where


def scale_mixture_kl(
    mu: Tensor,
    rho: Tensor,
    pi: Tensor,
    sigma_1: Tensor,
    sigma_2: Tensor,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
    config: TileConfig | None = None,
) -> Tensor:
    """The estimate of the KL, summed; see the operator of this name."""
    config = config or select_tile_config(mu.shape)
    programs = programs_of(mu.shape, address, config, False)
    if programs == 0:
        return mu.new_zeros((), dtype=torch.float32)
    kl = new_total(mu, programs)
    arguments = _arguments((mu, rho), (pi, sigma_1, sigma_2), (seed, sample), address)
    _mixture_kl_kernel[(programs,)](kl, *arguments, **tile_constants(mu.shape, address, config))
    return value_of(kl, mu)


def scale_mixture_kl_backward(
    grad_kl: Tensor,
    mu: Tensor,
    rho: Tensor,
    pi: Tensor,
    sigma_1: Tensor,
    sigma_2: Tensor,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """dmu and drho; see the operator of this name."""
    config = config or select_tile_config(mu.shape)
    programs = programs_of(mu.shape, address, config, False)
    grads = new_gradients((mu,), mu)
    if programs > 0:
        arguments = _arguments((mu, rho), (pi, sigma_1, sigma_2), (seed, sample), address)
        constants = tile_constants(mu.shape, address, config)
        _mixture_kl_backward_kernel[(programs,)](grads, grad_kl, *arguments, **constants)
    return grads

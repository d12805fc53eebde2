"""The KL of the tiles that a product draws: what it is made of is added up as the product goes along."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedbayes.kernels.fragments import side_by_side
from fusedbayes.kernels.gaussian import kl_centres, kl_from_sums, kl_terms
from fusedbayes.kernels.parameter import open_prior, prior_at
from fusedbayes.kernels.quads import sum_quads, sum_squares_of_quads


class Charge(NamedTuple):
    """What the KL of a program's tiles needs.

    Attributes:
        prior: of `open_prior`.
        counts: (R, 1), 1 for a row whose KL counts and 0 for another.
        centres: of the KL's terms.
        centre: of the logarithms that go into one sum, (ROWS, 1).
    """

    prior: Any
    counts: Any
    centres: Any
    centre: Any


@triton.jit
def _sum_rows(tile, ROWS: tl.constexpr):
    """(R, Q) to (ROWS, Q): sums of rows ROWS apart. Where these lie in one thread nothing moves."""
    return tl.sum(tl.reshape(tile, (tile.shape[0] // ROWS, ROWS, tile.shape[1])), axis=0)


@triton.jit
def open_charge(weight, start, counted, ROWS: tl.constexpr):
    """The charge for tiles of a `Gaussian` from element `start` on; counted: (R, 1), the rows whose KL counts."""
    prior = open_prior(weight, start)
    centres = kl_centres(prior[1])
    centre = _sum_rows(tl.where(counted, 4.0 * centres[0], 0.0), ROWS)
    return Charge(prior, tl.where(counted, 1.0, 0.0), centres, centre)


@triton.jit
def add_kl(sums, charge, mu, sigma, offsets, exist, quads_exist):
    """The logarithms and squares (ROWS, Q) of `kl_terms`, with those of one more tile (R, 4 Q), or its blocks.

    offsets: of its elements.
    exist, quads_exist: which of its columns and of its quads, or None if all.
    """
    logarithms, squares = sums
    prior_mu, prior_sigma = prior_at(charge.prior, offsets, exist)
    logarithm, scale, shift = kl_terms(mu, sigma, prior_mu, prior_sigma)
    # A multiply-add for a row, whether it counts or not: cheaper than a select.
    logarithm, scale, shift = side_by_side(logarithm), side_by_side(scale), side_by_side(shift)
    logarithm = _sum_rows(sum_quads(logarithm) * charge.counts, logarithms.shape[0]) - charge.centre
    square = sum_squares_of_quads(scale, shift, -4.0 * charge.centres[1])
    square = _sum_rows(square * charge.counts, squares.shape[0])
    if quads_exist is not None:
        logarithm, square = tl.where(quads_exist, logarithm, 0.0), tl.where(quads_exist, square, 0.0)
    return logarithms + logarithm, squares + square


@triton.jit
def total_kl(sums, charge):
    """The KL of all tiles from their sums."""
    return kl_from_sums(tl.sum(sums[0]), tl.sum(sums[1]), charge.centres)

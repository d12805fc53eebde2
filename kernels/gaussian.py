"""Device functions of a Gaussian weight: its standard deviation, its KL, its gradients."""

import triton
import triton.language as tl

from fusedbayes.kernels.math import LN_2, LOG2_E, SMALLEST_NORMAL, absolute, exp2, log2, reciprocal


@triton.jit
def _exp_and_sigma(rho):
    """t = exp(-|rho|) and sigma = max(log(1 + exp(rho)), 2^-126), relatively accurate for every rho.

    log(1 + exp(rho)) = max(rho, 0) + log1p(t) and log1p(t) = t P(t). P is the polynomial with P(0) = 1 that is nearest
    to log1p(t) / t on [0, 1]: relative error 2.2e-7, where a logarithm of 1 + t would lose a small t.
    """
    t = exp2(absolute(rho) * -LOG2_E)
    p = -0.008778958741830744 * t + 0.04498665310825786
    p = p * t - 0.10902292539197489
    p = p * t + 0.17847209198564584
    p = p * t - 0.24536866497072019
    p = p * t + 0.3328406386557933
    p = p * t - 0.49998180352207144
    p = p * t + 1.0
    softplus = p * t + tl.maximum(rho, 0.0)
    # The floor is fusedbayes.reference.SIGMA_FLOOR. A NaN stays one: it is for the user to see.
    return t, tl.maximum(softplus, SMALLEST_NORMAL, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigma_from_rho(rho):
    """sigma = max(softplus(rho), 2^-126)."""
    _, sigma = _exp_and_sigma(rho)
    return sigma


@triton.jit
def sigma_and_slope(rho):
    """sigma, and sigmoid(rho) / sigma, at most 1 where 1 / sigma would overflow; 0 below sigma's floor.

    With t = exp(-|rho|) it is (t if rho < 0 else 1) / (sigma (1 + t)).
    """
    t, sigma = _exp_and_sigma(rho)
    return sigma, tl.where(rho < 0.0, t, 1.0) * reciprocal(sigma * t + sigma)


@triton.jit
def kl_terms(mu, sigma, prior_mu, prior_sigma):
    """What varies in the KL of a weight: a logarithm to base 2, and two numbers whose squares are added up.

    KL = log(s0 / sigma) + (sigma^2 + (mu - m0)^2) / (2 s0^2) - 1/2. If s0 is one number, it comes in later.
    """
    logarithm = log2(sigma)
    shift = mu - prior_mu
    if prior_sigma.type.is_block():
        inverse = reciprocal(prior_sigma)
        logarithm -= log2(prior_sigma)
        sigma *= inverse
        shift *= inverse
    return logarithm, sigma, shift


@triton.jit
def kl_centres(prior_sigma):
    """What the logarithm and the sum of both squares of `kl_terms` are where posterior and prior are the same.

    It is taken off before the terms are added up: the difference of two large sums would be wrong where it is small.
    prior_sigma: the number, or a pointer to one for each weight.
    """
    logarithm, square = 0.0, 1.0
    if not prior_sigma.dtype.is_ptr():
        logarithm, square = log2(prior_sigma), prior_sigma * prior_sigma
    return logarithm, square


@triton.jit
def kl_from_sums(logarithms, squares, centres):
    """The KL from the sums of the centred logarithms and squares: see `kl_terms` and `kl_centres`."""
    _, square = centres
    return 0.5 * squares / square - LN_2 * logarithms


@triton.jit
def gaussian_gradients(grad_mu, grad_sigma, grad_kl, mu, rho, prior_mu, prior_sigma, WITH_KL: tl.constexpr):
    """dmu = G + k (mu - m0) and drho = (H + k sigma - g / sigma) sigmoid(rho), with k = g / s0^2.

    G and H, `grad_mu` and `grad_sigma`, are what the output says of mu and sigma; g = dL/dKL is `grad_kl`.
    """
    sigma, sigmoid_over_sigma = sigma_and_slope(rho)
    dmu = grad_mu
    factor = grad_sigma
    if WITH_KL:
        k = grad_kl / prior_sigma / prior_sigma
        dmu += k * (mu - prior_mu)
        factor = sigma * (factor + k * sigma) - grad_kl
    else:
        factor *= sigma
    return dmu, factor * sigmoid_over_sigma

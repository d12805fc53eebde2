"""The definition of right, in pure PyTorch: what every kernel is compared with.

Plain differentiable functions, for any device and floating dtype; autograd derives their gradients. Arithmetic is done
in float32, or float64 for float64 tensors, and rounded once at the end. Nothing is validated here (`functional` does).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedbayes import noise
from fusedbayes.noise import Address, Role

# Below this standard deviation softplus is cut off, so that log(sigma) and the KL stay finite for every finite rho.
SIGMA_FLOOR = torch.finfo(torch.float32).tiny


class GaussianParameter(NamedTuple):
    """A random parameter w with posterior N(mu, softplus(rho)^2) and prior N(prior_mu, prior_sigma^2)."""

    mu: Tensor
    rho: Tensor
    prior_mu: Tensor
    prior_sigma: Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that arithmetic on `tensor` is done in: float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def sigma_from_rho(rho: Tensor) -> Tensor:
    """Sigma = max(log(1 + exp(rho)), 2^-126), without overflow; the gradient below the floor is 0."""
    # Above its threshold softplus returns rho: at 40 that is exact in float64 too, at the default 20 it is not.
    return F.softplus(rho, threshold=40.0).clamp(min=SIGMA_FLOOR)


def rho_from_sigma(sigma: Tensor) -> Tensor:
    """The inverse of `sigma_from_rho`: rho = log(exp(sigma) - 1), without overflow or cancellation.

    A sigma near the floor becomes twice the floor, where its gradient is not 0 yet.
    """
    sigma = sigma.clamp(min=2.0 * SIGMA_FLOOR)
    return sigma + torch.log(-torch.expm1(-sigma))


def gaussian_kl(
    mu: Tensor, sigma: Tensor, prior_mu: Tensor, prior_sigma: Tensor, log_sigma: Tensor | None = None
) -> Tensor:
    """KL(N(mu, sigma^2) || N(prior_mu, prior_sigma^2)) per element, in nats.

    log(s0 / sigma) + (sigma^2 + (mu - m0)^2) / (2 s0^2) - 1/2; the ratios are squared, not the scales, so that a
    small prior_sigma does not underflow. Who has log(sigma) gives it, for a sigma that may underflow.
    """
    dtype = compute_dtype(mu)
    mu, sigma, prior_mu, prior_sigma = (t.to(dtype) for t in (mu, sigma, prior_mu, prior_sigma))
    log_sigma = sigma.log() if log_sigma is None else log_sigma.to(dtype)
    scale, shift = sigma / prior_sigma, (mu - prior_mu) / prior_sigma
    return prior_sigma.log() - log_sigma + 0.5 * (scale.square() + shift.square() - 1.0)


def weight_kl(parameter: GaussianParameter) -> Tensor:
    """The KL of `parameter` summed over its elements: 0-d, float32 (float64 for float64 parameters)."""
    sigma = sigma_from_rho(parameter.rho.to(compute_dtype(parameter.rho)))
    return gaussian_kl(parameter.mu, sigma, parameter.prior_mu, parameter.prior_sigma).sum()


def weight_noise(mu: Tensor, seed: Tensor, sample: int | Tensor, address: Address) -> Tensor:
    """eps of mu's shape, in the dtype that arithmetic on mu is done in.

    The noise is addressed in the tensor seen as two-dimensional: ``mu.flatten(1)``, or one row for a vector.
    """
    rows, columns = matrix_shape(mu)
    stream, row_offset, column_offset = address
    eps = noise.normal(
        seed,
        rows,
        columns,
        sample=sample,
        stream=stream,
        row_offset=row_offset,
        column_offset=column_offset,
        dtype=compute_dtype(mu),
        device=mu.device,
    )
    return eps.reshape(mu.shape)


def sample_weight(
    mu: Tensor,
    rho: Tensor,
    seed: Tensor,
    sample: int | Tensor = 0,
    address: Address = Address(),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """w = mu + softplus(rho) * eps, of mu's shape, rounded to `dtype` (default mu's)."""
    arithmetic = compute_dtype(mu)
    eps = weight_noise(mu, seed, sample, address)
    weight = mu.to(arithmetic) + sigma_from_rho(rho.to(arithmetic)) * eps
    return weight.to(mu.dtype if dtype is None else dtype)


def bayes_linear(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    seed: Tensor,
    sample: int | Tensor = 0,
    weight_address: Address = Address(Role.WEIGHT),
    bias_address: Address = Address(Role.BIAS),
) -> Tensor:
    """y = x W^T + b with W and b sampled once for the whole batch (Blundell et al. 2015), in x's dtype."""
    weight = sample_weight(weight_mu, weight_rho, seed, sample, weight_address, x.dtype)
    bias = None
    if bias_mu is not None and bias_rho is not None:
        bias = sample_weight(bias_mu, bias_rho, seed, sample, bias_address, x.dtype)
    return F.linear(x, weight, bias)


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """(rows, columns) of `tensor` seen as the matrix that the noise is addressed in."""
    return (1, tensor.numel()) if tensor.dim() < 2 else (tensor.shape[0], math.prod(tensor.shape[1:]))

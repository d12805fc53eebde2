"""The definition of right, in pure PyTorch: what every kernel is compared with.

Plain differentiable functions, for any device and floating dtype; autograd derives their gradients. Arithmetic is done
in float32, or float64 for float64 tensors, and rounded once at the end. Nothing is validated here (`functional` does).
"""

import contextlib
import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedbayes import noise
from fusedbayes.noise import Address, Role

# How the output of a layer is sampled: see `bayes_linear`.
Estimator = Literal["shared", "local", "flipout"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

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
    """sigma = max(log(1 + exp(rho)), 2^-126), without overflow; the gradient below the floor is 0."""
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


def normal_log_prob(z: Tensor, log_sigma: Tensor) -> Tensor:
    """log N(w; mu, sigma^2) per element, for z = (w - mu) / sigma."""
    return -0.5 * z.square() - log_sigma - 0.5 * math.log(2.0 * math.pi)


def scale_mixture_log_prob(w: Tensor, pi: Tensor, sigma_1: Tensor, sigma_2: Tensor) -> Tensor:
    """log(pi N(w; 0, sigma_1^2) + (1 - pi) N(w; 0, sigma_2^2)) per element, where both densities may underflow."""
    shares = (pi.log(), torch.log1p(-pi))
    densities = [
        share + normal_log_prob(w / sigma, sigma.log()) for share, sigma in zip(shares, (sigma_1, sigma_2), strict=True)
    ]
    # Not torch.logaddexp, whose second derivative is NaN where the two are far apart.
    return torch.logsumexp(torch.stack(densities), 0)


def scale_mixture_kl(
    mu: Tensor,
    rho: Tensor,
    pi: Tensor,
    sigma_1: Tensor,
    sigma_2: Tensor,
    seed: Tensor,
    sample: int | Tensor = 0,
    address: Address = Address(),
) -> Tensor:
    """The sum of log q(w) - log p(w) for w = mu + sigma eps and the prior of `scale_mixture_log_prob`."""
    dtype = compute_dtype(mu)
    sigma, eps = sigma_from_rho(rho.to(dtype)), weight_noise(mu, seed, sample, address)
    mixture = (tensor.to(dtype) for tensor in (pi, sigma_1, sigma_2))
    log_p = scale_mixture_log_prob(mu.to(dtype) + sigma * eps, *mixture)
    return (normal_log_prob(eps, sigma.log()) - log_p).sum()


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
    *,
    num_samples: int = 1,
    estimator: Estimator = "shared",
) -> Tensor:
    """y (num_samples * M, N) for x (num_samples * M, K), in x's dtype; each Monte Carlo sample has its M rows.

    "shared": y = x W^T + b, with W and b sampled once for the M rows (Blundell et al. 2015). "local": y = x mu^T + b_mu
    + sqrt(x^2 (sigma^2)^T + sigma_b^2) * zeta (Kingma et al. 2015). "flipout": y = x mu^T + ((x * r) (sigma * eps)^T) *
    s + b (Wen et al. 2018). zeta, r and s belong to a row of the M and, as in the weight, to its output or its input;
    their streams are the weight's plus their `Role`.
    """
    forward = {"shared": _shared_linear, "local": _local_linear, "flipout": _flipout_linear}[estimator]
    weight, bias = (weight_mu, weight_rho), (bias_mu, bias_rho)
    outputs = [
        forward(rows, weight, bias, (seed, sample + index), weight_address, bias_address)
        for index, rows in enumerate(x.chunk(num_samples) if x.shape[0] else [x])
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


Key = tuple[Tensor, int | Tensor]
MaybeBias = tuple[Tensor | None, Tensor | None]


def _shared_linear(
    x: Tensor, weight: tuple[Tensor, Tensor], bias: MaybeBias, key: Key, address: Address, bias_address: Address
) -> Tensor:
    return F.linear(x, sample_weight(*weight, *key, address, x.dtype), _sample_bias(bias, key, bias_address, x.dtype))


def _flipout_linear(
    x: Tensor, weight: tuple[Tensor, Tensor], bias: MaybeBias, key: Key, address: Address, bias_address: Address
) -> Tensor:
    mu, rho = weight
    N, K = mu.shape
    dtype = compute_dtype(mu)
    perturbation = sigma_from_rho(rho.to(dtype)) * weight_noise(mu, *key, address)
    r, s = (signs_of(x, size, key, address, role) for size, role in ((K, Role.FLIPOUT_INPUT), (N, Role.FLIPOUT_OUTPUT)))
    y = F.linear(x, mu.to(x.dtype), _sample_bias(bias, key, bias_address, x.dtype))
    return y + F.linear(x * r, perturbation.to(x.dtype)) * s


def _local_linear(
    x: Tensor, weight: tuple[Tensor, Tensor], bias: MaybeBias, key: Key, address: Address, bias_address: Address
) -> Tensor:
    mean, std = local_moments(x, weight, bias)
    zeta = local_noise(x.shape[0], weight[0], key, address)
    return (mean + std * zeta).to(x.dtype)


def local_moments(x: Tensor, weight: tuple[Tensor, Tensor], bias: MaybeBias) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each output, in the dtype of arithmetic; where nothing varies, a gradient of 0."""
    (mu, rho), dtype = weight, compute_dtype(weight[0])
    bias_mu, bias_rho = bias
    mean = F.linear(x, mu.to(x.dtype), None if bias_mu is None else bias_mu.to(x.dtype)).to(dtype)
    # Not in 16 bits, whatever autocast says: squares of float16 overflow and underflow.
    with without_autocast(x):
        variance = F.linear(x.to(dtype).square(), sigma_from_rho(rho.to(dtype)).square())
    if bias_rho is not None:
        variance = variance + sigma_from_rho(bias_rho.to(dtype)).square()
    return mean, safe_sqrt(variance)


def safe_sqrt(variance: Tensor) -> Tensor:
    """The square root, with a gradient of 0 where it has no derivative."""
    varies = variance > 0.0
    # The root of something else there: a where after the root would multiply infinity with 0.
    return torch.where(varies, variance, 1.0).sqrt() * varies


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Products within are of their operands' dtype."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def local_noise(rows: int, weight_mu: Tensor, key: Key, address: Address) -> Tensor:
    """zeta (rows, N) of the local estimator."""
    return noise.normal(
        key[0],
        rows,
        weight_mu.shape[0],
        sample=key[1],
        stream=address.stream + Role.LOCAL,
        column_offset=address.row_offset,
        dtype=compute_dtype(weight_mu),
        device=weight_mu.device,
    )


def signs_of(x: Tensor, columns: int, key: Key, address: Address, role: int) -> Tensor:
    """Flipout's signs of x's rows: of the inputs, which are the weight's columns, or of the outputs, its rows."""
    offset = address.column_offset if role == Role.FLIPOUT_INPUT else address.row_offset
    return noise.signs(
        key[0],
        x.shape[0],
        columns,
        sample=key[1],
        stream=address.stream + role,
        column_offset=offset,
        dtype=x.dtype,
        device=x.device,
    )


def _sample_bias(bias: MaybeBias, key: Key, address: Address, dtype: torch.dtype) -> Tensor | None:
    mu, rho = bias
    return None if mu is None or rho is None else sample_weight(mu, rho, *key, address, dtype)


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """(rows, columns) of `tensor` seen as the matrix that the noise is addressed in."""
    return (1, tensor.numel()) if tensor.dim() < 2 else (tensor.shape[0], math.prod(tensor.shape[1:]))

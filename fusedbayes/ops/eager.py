"""The operators in PyTorch, for any device: the reference's forward, and its gradients in closed form.

The gradients (docs/math.md derives them) draw the noise again instead of keeping it; the tests compare them with
what autograd makes of `fusedbayes.reference`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedbayes import reference
from fusedbayes.noise import Address
from fusedbayes.reference import SIGMA_FLOOR, GaussianParameter, compute_dtype


def sample_weight(
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
    dtype: torch.dtype,
    with_kl: bool,
) -> tuple[Tensor, Tensor]:
    weight = reference.sample_weight(mu, rho, seed, _or_zero(sample), Address(*address), dtype)
    # Row-major like the kernels' and the fake, even if mu is not.
    return weight.contiguous(), weight_kl(mu, rho, prior_mu, prior_sigma) if with_kl else _no_kl(mu)


def sample_weight_backward(
    grad_weight: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
    seed: Tensor | None,
    sample: Tensor | None,
    address: Sequence[int],
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(mu)
    softplus = F.softplus(rho.to(dtype), threshold=40.0)
    # Below the floor sigma is constant.
    sigmoid = torch.sigmoid(rho.to(dtype)).masked_fill_(softplus < SIGMA_FLOOR, 0.0)
    grad_mu, grad_rho = mu.new_zeros(mu.shape, dtype=dtype), mu.new_zeros(mu.shape, dtype=dtype)
    if grad_weight is not None and seed is not None:
        grad_mu += grad_weight
        eps = reference.weight_noise(mu, seed, _or_zero(sample), Address(*address))
        grad_rho += eps.mul_(grad_weight).mul_(sigmoid)
    if grad_kl is not None and prior_mu is not None and prior_sigma is not None:
        prior_sigma = prior_sigma.to(dtype)
        sigma = softplus.clamp(min=SIGMA_FLOOR)
        grad_mu += grad_kl * ((mu.to(dtype) - prior_mu.to(dtype)) / prior_sigma / prior_sigma)
        # sigmoid / sigma is at most 1, while grad_kl / sigma may overflow.
        grad_rho += grad_kl * (sigma / prior_sigma / prior_sigma * sigmoid - sigmoid / sigma)
    return grad_mu.to(mu.dtype), grad_rho.to(rho.dtype)


def weight_kl(mu: Tensor, rho: Tensor, prior_mu: Tensor | None, prior_sigma: Tensor | None) -> Tensor:
    assert prior_mu is not None
    assert prior_sigma is not None
    return reference.weight_kl(GaussianParameter(mu, rho, prior_mu, prior_sigma))


def bayes_linear(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    weight_prior_mu: Tensor | None,
    weight_prior_sigma: Tensor | None,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    bias_prior_mu: Tensor | None,
    bias_prior_sigma: Tensor | None,
    seed: Tensor,
    sample: Tensor | None,
    weight_address: Sequence[int],
    bias_address: Sequence[int],
    with_kl: bool,
) -> tuple[Tensor, Tensor]:
    addresses = Address(*weight_address), Address(*bias_address)
    y = reference.bayes_linear(x, weight_mu, weight_rho, bias_mu, bias_rho, seed, _or_zero(sample), *addresses)
    if not with_kl:
        return y, _no_kl(weight_mu)
    kl = weight_kl(weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    if bias_mu is not None and bias_rho is not None:
        kl = kl + weight_kl(bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    return y, kl


def bayes_linear_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    weight_prior_mu: Tensor | None,
    weight_prior_sigma: Tensor | None,
    bias_mu: Tensor | None,
    bias_rho: Tensor | None,
    bias_prior_mu: Tensor | None,
    bias_prior_sigma: Tensor | None,
    seed: Tensor,
    sample: Tensor | None,
    weight_address: Sequence[int],
    bias_address: Sequence[int],
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x = grad_y.new_empty(0)
    if needs_x:
        noise = (seed, _or_zero(sample), Address(*weight_address))
        grad_x = grad_y @ reference.sample_weight(weight_mu, weight_rho, *noise, grad_y.dtype)
    grads, bias_grads = ((weight_mu.new_empty(0), weight_mu.new_empty(0)) for _ in range(2))
    if needs_weight:
        weight = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
        grads = sample_weight_backward(grad_y.t() @ x, grad_kl, *weight, seed, sample, weight_address)
    if needs_weight and bias_mu is not None and bias_rho is not None:
        grad_bias = grad_y.sum(0, dtype=compute_dtype(grad_y))
        bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
        bias_grads = sample_weight_backward(grad_bias, grad_kl, *bias, seed, sample, bias_address)
    return grad_x, *grads, *bias_grads


def _no_kl(mu: Tensor) -> Tensor:
    return mu.new_empty(0, dtype=compute_dtype(mu))


def _or_zero(sample: Tensor | None) -> int | Tensor:
    return 0 if sample is None else sample

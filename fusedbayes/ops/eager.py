"""The operators in PyTorch, for any device: the reference's forward, and its gradients in closed form.

The gradients (docs/math.md derives them) draw the noise again instead of keeping it; the tests compare them with
what autograd makes of `fusedbayes.reference`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedbayes import noise, reference
from fusedbayes.noise import Address, Role
from fusedbayes.reference import SIGMA_FLOOR, Estimator, GaussianParameter, compute_dtype


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
    gradients: tuple[Tensor | None, Tensor | None] = (None, None)
    if grad_weight is not None and seed is not None:
        eps = reference.weight_noise(mu, seed, _or_zero(sample), Address(*address))
        gradients = grad_weight, eps.mul_(grad_weight)
    return _with_kl(*gradients, grad_kl, mu, rho, prior_mu, prior_sigma)


def _with_kl(
    grad_mu: Tensor | None,
    grad_sigma: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dmu and drho from what the output says of mu and sigma, if it does, and the KL."""
    dtype = compute_dtype(mu)
    softplus = F.softplus(rho.to(dtype), threshold=40.0)
    # Below the floor sigma is constant.
    sigmoid = torch.sigmoid(rho.to(dtype)).masked_fill_(softplus < SIGMA_FLOOR, 0.0)
    total_mu, total_rho = mu.new_zeros(mu.shape, dtype=dtype), mu.new_zeros(mu.shape, dtype=dtype)
    if grad_mu is not None and grad_sigma is not None:
        total_mu += grad_mu
        total_rho += grad_sigma * sigmoid
    if grad_kl is not None and prior_mu is not None and prior_sigma is not None:
        prior_sigma = prior_sigma.to(dtype)
        sigma = softplus.clamp(min=SIGMA_FLOOR)
        total_mu += grad_kl * ((mu.to(dtype) - prior_mu.to(dtype)) / prior_sigma / prior_sigma)
        # sigmoid / sigma is at most 1, while grad_kl / sigma may overflow.
        total_rho += grad_kl * (sigma / prior_sigma / prior_sigma * sigmoid - sigmoid / sigma)
    return total_mu.to(mu.dtype), total_rho.to(rho.dtype)


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
    num_samples: int,
    same_input: bool,
    estimator: Estimator,
    with_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.repeat(num_samples, 1) if same_input else x
    layer = (weight_mu, weight_rho, bias_mu, bias_rho)
    addresses = Address(*weight_address), Address(*bias_address)
    options: Any = {"num_samples": num_samples, "estimator": estimator}
    y = reference.bayes_linear(x, *layer, seed, _or_zero(sample), *addresses, **options)
    slope = x.new_empty(0, num_samples)
    if estimator == "local":
        slope = _slope(x, layer, seed, _or_zero(sample), addresses[0], num_samples)
    kl = _no_kl(weight_mu)
    if with_kl:
        kl = weight_kl(weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
        if bias_mu is not None and bias_rho is not None:
            kl = kl + weight_kl(bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    return y, kl, slope


@torch.no_grad()
def _slope(
    x: Tensor,
    layer: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    seed: Tensor,
    sample: int | Tensor,
    address: Address,
    num_samples: int,
) -> Tensor:
    """zeta / (2 sqrt(v)), the derivative of the local estimator's outputs by their variances v; 0 where v is."""
    weight, bias = layer[:2], layer[2:]
    _, std = reference.local_moments(x, weight, bias)
    rows = x.shape[0] // num_samples
    zeta = [reference.local_noise(rows, weight[0], (seed, sample + index), address) for index in range(num_samples)]
    slope = torch.where(std > 0.0, torch.cat(zeta) / (2.0 * std), 0.0)
    most = torch.finfo(x.dtype).max
    return slope.clamp(-most, most).to(x.dtype)


def bayes_linear_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    slope: Tensor,
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
    num_samples: int,
    estimator: Estimator,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    address = Address(*weight_address)
    grad_xs, grad_mu, grad_sigma = [], weight_mu.new_zeros(()), weight_mu.new_zeros(())
    grad_bias_mu, grad_bias_sigma = grad_y.new_zeros(()), grad_y.new_zeros(())
    rows = x.shape[0] // num_samples
    for index in range(num_samples):
        here, key = slice(index * rows, (index + 1) * rows), (seed, _or_zero(sample) + index)
        g, x_s = grad_y[here], x[here]
        local = slope[here] if estimator == "local" else None
        second = _second_product(estimator, g, x_s, local, (weight_mu, weight_rho), key, address)
        if needs_x:
            grad_xs.append(second.grad_x)
        if needs_weight:
            with reference.without_autocast(x):
                grad_mu = grad_mu + g.t() @ x_s
                grad_sigma = grad_sigma + second.factor * (second.g.t() @ second.x)
        if needs_weight and bias_mu is not None and bias_rho is not None:
            sums = g.sum(0, dtype=compute_dtype(g)), second.g.sum(0, dtype=compute_dtype(g))
            grad_bias_mu = grad_bias_mu + sums[0]
            if estimator == "local":
                factor = 2.0 * reference.sigma_from_rho(bias_rho.to(compute_dtype(bias_rho)))
                grad_bias_sigma = grad_bias_sigma + factor * sums[1]
            else:
                eps = reference.weight_noise(bias_mu, *key, Address(*bias_address))
                grad_bias_sigma = grad_bias_sigma + eps * sums[0]
    grad_x = torch.cat(grad_xs) if needs_x else grad_y.new_empty(0)
    grads, bias_grads = ((weight_mu.new_empty(0), weight_mu.new_empty(0)) for _ in range(2))
    if needs_weight:
        weight = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
        grads = _with_kl(grad_mu, grad_sigma, grad_kl, *weight)
    if needs_weight and bias_mu is not None and bias_rho is not None:
        bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
        bias_grads = _with_kl(grad_bias_mu, grad_bias_sigma, grad_kl, *bias)
    return grad_x, *grads, *bias_grads


class _SecondProduct(NamedTuple):
    """The product by which sigma comes into the output, x A^T, backwards.

    Attributes:
        g, x: the product's cotangent and its operand: dL/dA = g^T x.
        factor: dA/dsigma.
        grad_x: of the whole layer.
    """

    g: Tensor
    x: Tensor
    factor: Tensor
    grad_x: Tensor


def _second_product(
    estimator: Estimator,
    g: Tensor,
    x: Tensor,
    slope: Tensor | None,
    weight: tuple[Tensor, Tensor],
    key: tuple[Tensor, int | Tensor],
    address: Address,
) -> _SecondProduct:
    mu, rho = weight
    sigma = reference.sigma_from_rho(rho.to(compute_dtype(rho)))
    if slope is not None:
        # Not in 16 bits: squares of float16 overflow and underflow.
        g_wide, x_wide = g.to(sigma.dtype), x.to(sigma.dtype)
        h = g_wide * slope
        with reference.without_autocast(x):
            grad_x = g_wide @ mu.to(sigma.dtype) + 2.0 * x_wide * (h @ sigma.square())
        return _SecondProduct(h, x_wide.square(), 2.0 * sigma, grad_x.to(g.dtype))
    eps = reference.weight_noise(mu, *key, address)
    if estimator == "shared":
        return _SecondProduct(g, x, eps, g @ (mu.to(eps.dtype) + sigma * eps).to(g.dtype))
    r = reference.signs_of(x, mu.shape[1], key, address, Role.FLIPOUT_INPUT)
    s = reference.signs_of(g, mu.shape[0], key, address, Role.FLIPOUT_OUTPUT)
    grad_x = g @ mu.to(g.dtype) + (g * s) @ (sigma * eps).to(g.dtype) * r
    return _SecondProduct(g * s, x * r, eps, grad_x)


def normal(
    rows: Tensor, columns: int, seed: Tensor, sample: Tensor | None, address: Sequence[int], dtype: torch.dtype
) -> Tensor:
    arithmetic = torch.promote_types(dtype, torch.float32)
    eps = noise.normal(seed, rows, columns, sample=_or_zero(sample), **_where(address), dtype=arithmetic)
    return eps.to(dtype).contiguous()


def signs(
    rows: Tensor, columns: int, seed: Tensor, sample: Tensor | None, address: Sequence[int], dtype: torch.dtype
) -> Tensor:
    signs = noise.signs(seed, rows, columns, sample=_or_zero(sample), **_where(address), dtype=dtype)
    return signs.contiguous()


def _where(address: Sequence[int]) -> dict[str, Any]:
    return dict(zip(("stream", "row_offset", "column_offset"), address, strict=True))


def _no_kl(mu: Tensor) -> Tensor:
    return mu.new_empty(0, dtype=compute_dtype(mu))


def _or_zero(sample: Tensor | None) -> int | Tensor:
    return 0 if sample is None else sample

"""The reference: the KL of torch.distributions, gradients by finite differences, safe for every finite rho."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from problems import EXTREME_RHO
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import fusedbayes
from fusedbayes import reference
from fusedbayes.noise import Address
from fusedbayes.reference import SIGMA_FLOOR, GaussianParameter

SEED = torch.tensor(77)


def double(*shape: int, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) + shift).requires_grad_()


def gaussians(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mu, sigma, prior_mu, prior_sigma with sigmas in [0.1, 1.6]."""
    mu, prior_mu = torch.randn(2, *shape, dtype=dtype)
    sigma, prior_sigma = 0.1 + 1.5 * torch.rand(2, *shape, dtype=dtype)
    return mu, sigma, prior_mu, prior_sigma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_gaussian_kl_is_that_of_torch_distributions(dtype: torch.dtype) -> None:
    mu, sigma, prior_mu, prior_sigma = gaussians((7, 11), dtype)
    kl = reference.gaussian_kl(mu, sigma, prior_mu, prior_sigma)
    exact = kl_divergence(*(Normal(m.double(), s.double()) for m, s in ((mu, sigma), (prior_mu, prior_sigma))))
    assert kl.dtype == dtype
    # Sixteen roundings, of the result where a square dominates, else of terms of order one.
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(kl.double(), exact, rtol=tolerance, atol=tolerance)


def test_gaussian_kl_of_the_prior_itself_is_zero() -> None:
    mu, sigma, *_ = gaussians((5, 3), torch.float64)
    torch.testing.assert_close(
        reference.gaussian_kl(mu, sigma, mu, sigma), torch.zeros(5, 3, dtype=torch.float64), rtol=0, atol=4e-15
    )


@pytest.mark.parametrize("spread", ["sigma", "log_var"])
@pytest.mark.parametrize(("reduction", "scale"), [("sum", 1.0), ("batchmean", 1 / 6), ("mean", 1 / 54), ("none", None)])
def test_public_gaussian_kl_of_latents(spread: str, reduction: Any, scale: float | None) -> None:
    """Latents of shape (batch, latent) = (6, 9): values and gradients."""
    mu, sigma, *_ = (t.requires_grad_() for t in gaussians((6, 9), torch.float64))
    exact = kl_divergence(Normal(mu, sigma), Normal(torch.zeros(()).double(), torch.ones(()).double()))
    exact = exact if scale is None else exact.sum() * scale
    given = {"sigma": sigma} if spread == "sigma" else {"log_var": sigma.square().log()}
    kl = fusedbayes.gaussian_kl(mu, **given, reduction=reduction)
    # Summing 54 terms of order one.
    torch.testing.assert_close(kl, exact, rtol=1e-14, atol=1e-14)
    cotangent = torch.randn_like(kl)
    for actual, expected in zip(
        torch.autograd.grad(kl, (mu, sigma), cotangent),
        torch.autograd.grad(exact, (mu, sigma), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(), (9,), (1, 9), (6, 1), (6, 9)], ids=str)
def test_public_gaussian_kl_broadcasts_the_prior(shape: tuple[int, ...]) -> None:
    mu, sigma, *_ = gaussians((6, 9), torch.float64)
    prior_mu, prior_sigma = (t.requires_grad_() for t in gaussians(shape, torch.float64)[2:])
    exact = kl_divergence(Normal(mu, sigma), Normal(prior_mu, prior_sigma)).sum()
    kl = fusedbayes.gaussian_kl(mu, sigma=sigma, prior_mu=prior_mu, prior_sigma=prior_sigma)
    torch.testing.assert_close(kl, exact, rtol=1e-14, atol=0)
    actual = torch.autograd.grad(kl, (prior_mu, prior_sigma))  # a prior may be learnt through gaussian_kl
    expected = torch.autograd.grad(exact, (prior_mu, prior_sigma))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_public_gaussian_kl_of_numbers_and_of_bfloat16() -> None:
    mu = torch.randn(3, 300).bfloat16()
    kl = fusedbayes.gaussian_kl(mu, sigma=0.25, prior_mu=0.5, prior_sigma=2.0, reduction="sum")
    exact = kl_divergence(Normal(mu.double(), 0.25), Normal(0.5, 2.0)).sum()
    assert kl.dtype == torch.float32
    # bf16 terms or a bf16 sum would be off by 4e-3.
    torch.testing.assert_close(kl.double(), exact.double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("log_var", [-200.0, -35.0, -8.25, 0.0, 8.0])
def test_public_gaussian_kl_of_any_log_var(dtype: torch.dtype, log_var: float) -> None:
    """What a VAE's encoder may return under autocast; exp in its own precision would underflow or lose digits."""
    given = torch.tensor(log_var, dtype=dtype, requires_grad=True)
    kl = fusedbayes.gaussian_kl(torch.tensor(0.5, dtype=dtype), log_var=given)
    kl.backward()
    # Five fp32 roundings of terms no larger than the sum of their sizes; the gradient is rounded to its dtype.
    size = 0.5 * (abs(log_var) + math.exp(log_var) + 1.25)
    assert abs(kl.item() - 0.5 * (-log_var + math.exp(log_var) - 0.75)) <= 5 * 2.0**-24 * size
    slope = 0.5 * (math.exp(log_var) - 1)
    assert given.grad is not None
    assert abs(given.grad.item() - slope) <= max(torch.finfo(dtype).eps, 5 * 2.0**-24) * max(1.0, abs(slope))


def test_weight_kl_sums_the_kl_of_softplus_rho() -> None:
    mu, rho, prior_mu = torch.randn(3, 4, 5, dtype=torch.float64)
    prior_sigma = torch.tensor(0.3, dtype=torch.float64)
    exact = kl_divergence(Normal(mu, rho.exp().log1p()), Normal(prior_mu, prior_sigma)).sum()
    kl = reference.weight_kl(GaussianParameter(mu, rho, prior_mu, prior_sigma))
    torch.testing.assert_close(kl, exact, rtol=1e-14, atol=0)


def test_gradcheck_of_sample_weight() -> None:
    noise = SEED, 1, Address(stream=3, row_offset=5, column_offset=2)
    assert torch.autograd.gradcheck(
        lambda mu, rho: reference.sample_weight(mu, rho, *noise), (double(3, 5), double(3, 5))
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradcheck_of_bayes_linear(bias: bool) -> None:
    inputs = (double(4, 5), double(3, 5), double(3, 5), *((double(3), double(3)) if bias else (None, None)))
    assert torch.autograd.gradcheck(lambda *tensors: reference.bayes_linear(*tensors, SEED), inputs)


def test_gradcheck_of_weight_kl() -> None:
    prior_sigma = (0.5 + torch.rand(3, 5, dtype=torch.float64)).requires_grad_()
    inputs = (double(3, 5), double(3, 5, shift=-1.0), double(3, 5), prior_sigma)
    assert torch.autograd.gradcheck(lambda *tensors: reference.weight_kl(GaussianParameter(*tensors)), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_sigma_is_softplus_down_to_its_floor(dtype: torch.dtype) -> None:
    rho = torch.tensor(EXTREME_RHO, dtype=dtype)
    exact = np.maximum(np.logaddexp(0.0, np.array(EXTREME_RHO)), SIGMA_FLOOR)
    sigma = reference.sigma_from_rho(rho)
    assert sigma.dtype == dtype
    # exp of a number as large as 88 carries its rounding 88-fold.
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(sigma.double(), torch.from_numpy(exact), rtol=4 * epsilon, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("rho", EXTREME_RHO)
def test_kl_and_its_gradients_are_finite(dtype: torch.dtype, rho: float) -> None:
    mu = torch.tensor([0.5], dtype=dtype, requires_grad=True)
    rho_tensor = torch.tensor([rho], dtype=dtype, requires_grad=True)
    prior = torch.tensor(0.0), torch.tensor(0.1)
    kl = reference.weight_kl(GaussianParameter(mu, rho_tensor, *prior))
    gradients = torch.autograd.grad(kl, (mu, rho_tensor))
    assert kl.isfinite()
    assert kl > 0
    assert all(gradient.isfinite().all() for gradient in gradients)
    if rho < math.log(SIGMA_FLOOR):
        assert gradients[1] == 0  # there sigma is constant
    elif rho < -10:
        # The KL falls like -log(sigma) = -rho; 2^-8 is the rounding of bf16.
        assert abs(gradients[1].item() + 1) <= 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_rho_from_sigma_inverts_softplus(dtype: torch.dtype) -> None:
    sigma = torch.tensor([2 * SIGMA_FLOOR, 1e-30, 1e-7, 1e-3, 0.1, 1.0, 17.0, 89.0, 1e4], dtype=dtype)
    rho = reference.rho_from_sigma(sigma)
    # One rounding of rho moves sigma by sigma'(rho) / sigma <= 1 times it, relatively; |rho| <= 88 where that matters.
    for value, expected, r in zip(reference.sigma_from_rho(rho), sigma, rho, strict=True):
        rtol = torch.finfo(dtype).eps * (4 + min(abs(r.item()), 88))
        torch.testing.assert_close(value, expected, rtol=rtol, atol=0)
    # Where sigma is 0 its rho still has a gradient, which it would not have at the floor.
    rho = reference.rho_from_sigma(torch.zeros((), dtype=dtype)).requires_grad_()
    reference.sigma_from_rho(rho).log().backward()
    assert rho.grad is not None
    assert abs(rho.grad.item() - 1) < 1e-5


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 4)], ids=str)
def test_sampled_weight_is_float64_exact(shape: tuple[int, ...]) -> None:
    mu, rho = torch.randn(2, *shape, dtype=torch.float64)
    address = Address(stream=4, row_offset=1, column_offset=3)
    columns = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    rows = shape[0] if len(shape) > 1 else 1
    where = {"sample": 2} | address._asdict()
    eps = fusedbayes.noise.normal(SEED, rows, columns, **where, dtype=torch.float64).view(shape)
    exact = mu + rho.exp().log1p() * eps
    weight = reference.sample_weight(mu, rho, SEED, 2, address)
    torch.testing.assert_close(weight, exact, rtol=4e-15, atol=4e-15)
    single = reference.sample_weight(mu.float(), rho.float(), SEED, 2, address)
    assert single.dtype == torch.float32
    # |eps| < 5 is right to 1e-5, by contract, and sigma below 5.
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=5e-5)


def test_sampled_weight_is_rounded_once() -> None:
    mu, rho = torch.randn(2, 5, 7)
    sampled = reference.sample_weight(mu, rho, SEED, dtype=torch.bfloat16)
    assert torch.equal(sampled, reference.sample_weight(mu, rho, SEED).bfloat16())
    half = reference.sample_weight(mu.half(), rho.half(), SEED)
    assert torch.equal(half, reference.sample_weight(mu.half().float(), rho.half().float(), SEED).half())


def test_sampled_weights_have_mean_mu_and_deviation_sigma() -> None:
    draws = 20_000
    mu, rho = torch.randn(2, 7, dtype=torch.float64)
    sigma = reference.sigma_from_rho(rho)
    weight = reference.sample_weight(mu.expand(draws, 7), rho.expand(draws, 7), SEED)
    # Five standard errors.
    assert ((weight.mean(0) - mu).abs() < 5 * sigma / draws**0.5).all()
    assert ((weight.std(0) - sigma).abs() < 5 * sigma / (2 * draws) ** 0.5).all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_bayes_linear_multiplies_by_the_sampled_weights(bias: bool) -> None:
    x, mu, rho = double(2, 4, 5), double(3, 5), double(3, 5)
    bias_parameter = (double(3), double(3)) if bias else (None, None)
    addresses = Address(stream=8, column_offset=2), Address(stream=9)
    y = reference.bayes_linear(x, mu, rho, *bias_parameter, SEED, 1, *addresses)
    expected = torch.einsum("bik,nk->bin", x, reference.sample_weight(mu, rho, SEED, 1, addresses[0]))
    if bias:
        expected = expected + reference.sample_weight(*bias_parameter, SEED, 1, addresses[1])
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)

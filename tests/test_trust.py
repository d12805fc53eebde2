"""Bayesian linear regression with known noise, where mean field has a closed form: does training find it?

TARGETS regressions share their inputs: y_k = X w_k + noise, w_k ~ N(0, s0^2 I). Each posterior is N(m_k, P^-1) with
P = X^T X / s^2 + I / s0^2 and m_k = P^-1 X^T y_k / s^2. The factorised Gaussian closest to it has the means m_k and
sigma_i^2 = 1 / P_ii; its bound lies below the log evidence by KL(q || posterior) = (sum_i log P_ii - log det P) / 2.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from fusedbayes import ELBO, BayesLinear
from fusedbayes.reference import rho_from_sigma, sigma_from_rho

N, D, TARGETS = 60, 4, 8
# A prior narrow enough to move the means by most of a sigma, so that its pull is tested too.
NOISE_SIGMA, PRIOR_SIGMA = 1.0, 0.3
# Training: steps before and while the iterates are averaged, samples per step, samples of the final bound.
BURN_IN, AVERAGED, SAMPLES, FINAL_SAMPLES = 300, 800, 4, 1000


class Regression(NamedTuple):
    x: Tensor  # (N, D)
    y: Tensor  # (N, TARGETS)
    design: Tensor  # X^T X / s^2, (D, D)
    precision: Tensor  # P, (D, D)
    mean: Tensor  # m, (TARGETS, D)
    sigma: Tensor  # 1 / sqrt(P_ii), (D,)


class Trained(NamedTuple):
    data: Regression
    elbo: ELBO
    mu: Tensor  # (TARGETS, D), averaged over the iterates; the layer holds them too
    log_sigma: Tensor


def regression() -> Regression:
    x = torch.randn(N, D, dtype=torch.float64) @ (torch.eye(D, dtype=torch.float64) + 0.5)
    y = x @ torch.randn(D, TARGETS, dtype=torch.float64) + NOISE_SIGMA * torch.randn(N, TARGETS, dtype=torch.float64)
    design = x.T @ x / NOISE_SIGMA**2
    precision = design + torch.eye(D, dtype=torch.float64) / PRIOR_SIGMA**2
    mean = torch.linalg.solve(precision, x.T @ y / NOISE_SIGMA**2).T
    return Regression(x, y, design, precision, mean, precision.diagonal().rsqrt())


def nll(output: Tensor, y: Tensor) -> Tensor:
    """Per example, in nats, constants included."""
    return (0.5 * ((y - output) / NOISE_SIGMA).square() + 0.5 * math.log(2 * math.pi * NOISE_SIGMA**2)).sum(-1)


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(1)
    data = regression()
    # sigma starts below its optimum: from there the gradient is at most that of the entropy, and no step is too long.
    layer = BayesLinear(D, TARGETS, bias=False, prior_sigma=PRIOR_SIGMA, sigma_init=0.02, dtype=torch.float64)
    elbo = ELBO(layer, nll, N, num_samples=SAMPLES)
    # In the bound over all data the curvature is P for mu, and 2 for log(sigma), which is about rho.
    steps = {"weight_mu": 0.8 / torch.linalg.eigvalsh(data.precision).max().item(), "weight_rho": 0.03}
    groups = [{"params": layer.get_parameter(name), "lr": N * step} for name, step in steps.items()]
    optimizer = torch.optim.SGD(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + step / BURN_IN) ** -0.6)
    mu, log_sigma = torch.zeros_like(layer.weight_mu), torch.zeros_like(layer.weight_mu)
    for step in range(BURN_IN + AVERAGED):
        optimizer.zero_grad()
        elbo(data.x, data.y).loss.backward()
        optimizer.step()
        decay.step()
        if step >= BURN_IN:
            mu += layer.weight_mu.detach() / AVERAGED
            log_sigma += sigma_from_rho(layer.weight_rho.detach()).log() / AVERAGED
    with torch.no_grad():
        layer.weight_mu.copy_(mu)
        layer.weight_rho.copy_(rho_from_sigma(log_sigma.exp()))
    return Trained(data, elbo, mu, log_sigma)


# Averaging n = AVERAGED * SAMPLES stochastic gradients of noise covariance S and curvature H leaves the optimum with
# covariance H^-1 S H^-1 / n, whatever the steps (Polyak and Juditsky 1992). A sample's gradient with respect to mu is
# noisy by (X^T X / s^2) sigma eps, at most P sigma eps: so mu is known to sigma_i / sqrt(n). For log(sigma_i) the noise
# is at most eps_i * sum_j C_ij eps_j with C_ij = P_ij sigma_i sigma_j, of variance 1 + sum_j C_ij^2; the
# curvature is 2.
# On nine seeds the root mean square of the errors was 0.8 to 1.3 of these standard errors.
STANDARD_ERRORS = 5.0


def test_means_are_those_of_the_posterior(trained: Trained) -> None:
    data = trained.data
    error = (trained.mu - data.mean) / data.sigma
    assert error.abs().max().item() < STANDARD_ERRORS / math.sqrt(AVERAGED * SAMPLES)  # 0.09


def test_sigmas_are_those_of_the_posterior_given_all_other_weights(trained: Trained) -> None:
    data = trained.data
    correlation = data.precision * data.sigma * data.sigma[:, None]
    standard_error = (1.0 + correlation.square().sum(1)).sqrt() / 2 / math.sqrt(AVERAGED * SAMPLES)  # 0.017
    error = (trained.log_sigma - data.sigma.log()) / standard_error
    assert error.abs().max().item() < STANDARD_ERRORS
    # The targets are independent: averaged over them, sigma is right within 3 %.
    assert error.mean(0).abs().max().item() < STANDARD_ERRORS / math.sqrt(TARGETS)


def test_bound_is_below_the_evidence_and_as_close_as_mean_field_gets(trained: Trained) -> None:
    data, elbo = trained.data, trained.elbo
    covariance = NOISE_SIGMA**2 * torch.eye(N, dtype=torch.float64) + PRIOR_SIGMA**2 * data.x @ data.x.T
    evidence = MultivariateNormal(torch.zeros(N, dtype=torch.float64), covariance).log_prob(data.y.T).sum().item()
    gap = 0.5 * TARGETS * (data.precision.diagonal().log().sum() - data.precision.logdet()).item()

    elbo.num_samples = FINAL_SAMPLES
    with torch.no_grad():
        bound = -N * elbo(data.x, data.y).loss.item()

    # One sample's log likelihood is a quadratic form of its noise, with slope m / s0^2 at the optimum.
    scaled = data.design * data.sigma * data.sigma[:, None]
    slope = data.mean / PRIOR_SIGMA**2 * data.sigma
    variance = 0.5 * TARGETS * scaled.square().sum() + slope.square().sum()
    standard_error = math.sqrt(variance.item() / FINAL_SAMPLES)
    # The parameters' own errors cost (error of mu / sigma)^2 / 2 + (error of log sigma)^2 each: 0.01 nats in all.
    assert bound == pytest.approx(evidence - gap, abs=STANDARD_ERRORS * standard_error)
    assert bound < evidence
    assert STANDARD_ERRORS * standard_error < gap / 5, "or the comparison with the evidence says little"

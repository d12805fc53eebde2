"""The KL from a scale mixture on the CPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedbayes.kernels.cpu.native import Output, library
from fusedbayes.kernels.cpu.sample import Key, Parameter, kl_tensor, make_problem


def prepared(pi: Tensor, sigma_1: Tensor, sigma_2: Tensor) -> Tensor:
    """What the C++ wants of pi N(0, sigma_1^2) + (1 - pi) N(0, sigma_2^2): `Mixture` of fused.cpp."""
    share = float(pi)
    components = (float(sigma_1), share), (float(sigma_2), 1.0 - share)
    (narrow, narrow_share), (wide, wide_share) = sorted(components)
    log_share = _log(wide_share)
    log_odds = log_share - _log(narrow_share) + _log(narrow) - _log(wide)
    return torch.tensor(
        [wide, _inverse(wide), _inverse(narrow), log_odds, log_share], dtype=torch.float32, device="cpu"
    )


def _log(number: float) -> float:
    """Of what is no logarithm's argument a NaN or an infinity, which a KL must not hide."""
    return math.log(number) if number > 0.0 else -math.inf if number == 0.0 else math.nan


def _inverse(number: float) -> float:
    return 1.0 / number if number > 0.0 else math.nan


def scale_mixture_kl(
    mu: Tensor,
    rho: Tensor,
    pi: Tensor,
    sigma_1: Tensor,
    sigma_2: Tensor,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
) -> Tensor:
    """The estimate of the KL by one sample, summed."""
    parameter, key = Parameter(mu, rho, None, None), Key(seed, sample, address)
    problem = make_problem(parameter, key, mixture=prepared(pi, sigma_1, sigma_2))
    return kl_tensor(library().forward(problem, Output.NONE), mu, True)


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
) -> tuple[Tensor, Tensor]:
    """Its dmu and drho."""
    grads = mu.new_empty(mu.shape), rho.new_empty(rho.shape)
    parameter, key = Parameter(mu, rho, None, None), Key(seed, sample, address)
    how = {"grad_kl": grad_kl, "mixture": prepared(pi, sigma_1, sigma_2)}
    library().backward(make_problem(parameter, key, grad_mu=grads[0], grad_rho=grads[1], **how))
    return grads

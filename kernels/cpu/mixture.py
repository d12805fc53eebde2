"""The KL from a scale mixture on the CPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedbayes.kernels.cpu.native import Output, library
from fusedbayes.kernels.cpu.sample import Parameter, kl_tensor, make_problem


def prepared(pi: Tensor, sigma_1: Tensor, sigma_2: Tensor) -> Tensor:
    """What the C++ wants of pi N(0, sigma_1^2) + (1 - pi) N(0, sigma_2^2): `Mixture` of fused.cpp."""
    share, first, second = float(pi), float(sigma_1), float(sigma_2)
    if not (0.0 <= share <= 1.0 and 0.0 < first < math.inf and 0.0 < second < math.inf):
        # What is no mixture a KL must not hide.
        return torch.full((5,), math.nan, dtype=torch.float32, device="cpu")
    if share in (0.0, 1.0):  # as it may be in 16 bits: two halves of the one component
        share, first, second = 0.5, *([first if share == 1.0 else second] * 2)
    (narrow, narrow_share), (wide, wide_share) = sorted(((first, share), (second, 1.0 - share)))
    log_odds = math.log(wide_share) - math.log(narrow_share) + math.log(narrow) - math.log(wide)
    numbers = wide, 1.0 / wide, 1.0 / narrow, log_odds, math.log(wide_share)
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


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
    parameter, key = Parameter(mu, rho, None, None), (seed, sample, address)
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
    grads = library().new_result(mu), library().new_result(rho)
    parameter, key = Parameter(mu, rho, None, None), (seed, sample, address)
    mixture = prepared(pi, sigma_1, sigma_2)
    library().backward(
        make_problem(parameter, key, grad_kl=grad_kl, grad_mu=grads[0], grad_rho=grads[1], mixture=mixture)
    )
    return grads

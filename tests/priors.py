"""Every kind of prior, those that a user would write among them, for the tests of priors and of layers with them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fusedbayes.priors import Laplace, LearnedNormal, Normal, Prior, ScaleMixture

F64 = torch.float64


class LearnedStudentT(Prior):
    """As a user writes one: a density, and a scale that is learnt."""

    def __init__(self, df: float, scale: float) -> None:
        super().__init__()
        self.register_buffer("df", torch.tensor(df))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def log_prob(self, w: Tensor) -> Tensor:
        z = w / self.log_scale.exp()
        constant = torch.lgamma((self.df + 1) / 2) - torch.lgamma(self.df / 2) - 0.5 * torch.log(self.df * math.pi)
        return constant - self.log_scale - (self.df + 1) / 2 * torch.log1p(z.square() / self.df)


class Horseshoe(Prior):
    """The lower bound log(1 + 4 tau^2 / w^2) of the horseshoe's density, up to a constant; smooth at 0."""

    def log_prob(self, w: Tensor) -> Tensor:
        return torch.log(torch.log1p(0.04 / (w.square() + 1e-6)))


class Flat(Prior):
    """Improper: the KL is the negative entropy. A user's closed form."""

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        return -sigma.log() + 0.0 * mu


PRIORS: dict[str, Callable[[], Prior]] = {
    "normal": lambda: Normal(0.1, 0.3),
    "learned": lambda: LearnedNormal(0.1, 0.3),
    "laplace": lambda: Laplace(0.1, 0.2),
    "mixture": lambda: ScaleMixture(0.25, 0.8, 0.02),
    "student-t": lambda: LearnedStudentT(3.0, 0.2),
    "horseshoe": Horseshoe,
    "flat": Flat,
}


ESTIMATED = {"mixture", "student-t", "horseshoe"}


every_prior = pytest.mark.parametrize("name", PRIORS)


def parameter(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """mu and rho of sigmas from 0.02 to 0.6."""
    mu, rho = torch.randn(shape, dtype=dtype) * 0.3, torch.randn(shape, dtype=dtype) - 2.0
    return mu.requires_grad_(), rho.requires_grad_()

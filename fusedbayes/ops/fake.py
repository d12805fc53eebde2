"""Shapes and dtypes of the operators' results, without data: for torch.compile and the meta device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedbayes.reference import compute_dtype


def _kl(mu: Tensor, with_kl: bool) -> Tensor:
    return mu.new_empty(() if with_kl else 0, dtype=compute_dtype(mu))


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
    return mu.new_empty(mu.shape, dtype=dtype), _kl(mu, with_kl)


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
    return mu.new_empty(mu.shape), rho.new_empty(rho.shape)


def weight_kl(mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Tensor:
    return _kl(mu, True)


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
    return x.new_empty((x.shape[0], weight_mu.shape[0])), _kl(weight_mu, with_kl)


def bayes_linear_backward_input(
    grad_y: Tensor, mu: Tensor, rho: Tensor, seed: Tensor, sample: Tensor | None, address: Sequence[int]
) -> Tensor:
    return grad_y.new_empty((grad_y.shape[0], mu.shape[1]))


def bayes_linear_backward_weight(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    x: Tensor,
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), rho.new_empty(rho.shape)

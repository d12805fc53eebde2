"""Shapes and dtypes of the operators' results, without data: for torch.compile and the meta device.

The arguments are those of the schemas in `fusedbayes.ops`; what does not matter here goes by *_.
"""

from typing import Any

import torch
from torch import Tensor

from fusedbayes.reference import compute_dtype


def sample_weight(mu: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype: torch.dtype
    *_, dtype, with_kl = rest
    return mu.new_empty(mu.shape, dtype=dtype), _kl(mu, with_kl)


def sample_weight_backward(grad_weight: Any, grad_kl: Any, mu: Tensor, rho: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), rho.new_empty(rho.shape)


def weight_kl(mu: Tensor, *_: Any) -> Tensor:
    return _kl(mu, True)


def bayes_linear(x: Tensor, weight_mu: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weight_mu.shape[0])), _kl(weight_mu, rest[-1])


def bayes_linear_backward_input(grad_y: Tensor, mu: Tensor, *_: Any) -> Tensor:
    return grad_y.new_empty((grad_y.shape[0], mu.shape[1]))


def bayes_linear_backward_weight(
    grad_y: Any, grad_kl: Any, x: Any, mu: Tensor, rho: Tensor, prior_mu: Any, prior_sigma: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_mu, bias_rho, *_ = rest
    grads = mu.new_empty(mu.shape), rho.new_empty(rho.shape)
    if bias_mu is None:
        return *grads, mu.new_empty(0), mu.new_empty(0)
    return *grads, bias_mu.new_empty(bias_mu.shape), bias_rho.new_empty(bias_rho.shape)


def _kl(mu: Tensor, with_kl: bool) -> Tensor:
    return mu.new_empty(() if with_kl else 0, dtype=compute_dtype(mu))

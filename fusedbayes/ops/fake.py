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


def bayes_linear(x: Tensor, weight_mu: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, num_samples, same_input, estimator, with_kl = rest
    y = x.new_empty((num_samples * x.shape[0] if same_input else x.shape[0], weight_mu.shape[0]))
    return y, _kl(weight_mu, with_kl), x.new_empty(y.shape if estimator == "local" else (0, num_samples))


def bayes_linear_backward(
    grad_y: Tensor, grad_kl: Any, slope: Any, x: Tensor, mu: Tensor, rho: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    _, _, bias_mu, bias_rho, *_, needs_x, needs_weight = rest
    parameters = [parameter if needs_weight else None for parameter in (mu, rho, bias_mu, bias_rho)]
    grads = (mu.new_empty(0) if p is None else p.new_empty(p.shape) for p in parameters)
    return grad_y.new_empty(x.shape if needs_x else 0), *grads


def normal(rows: Tensor, columns: int, *rest: Any) -> Tensor:
    return rows.new_empty((rows.shape[0], columns), dtype=rest[-1])


signs = normal


def _kl(mu: Tensor, with_kl: bool) -> Tensor:
    return mu.new_empty(() if with_kl else 0, dtype=compute_dtype(mu))

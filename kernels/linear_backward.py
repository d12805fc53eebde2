"""The gradients of y = x W^T + b: those of the input and those of the parameters, as far as they are wanted."""

from typing import Any

from torch import Tensor

from fusedbayes.kernels.linear_backward_input import bayes_linear_backward_input
from fusedbayes.kernels.linear_backward_weight import bayes_linear_backward_weight
from fusedbayes.kernels.parameter import new_gradients


def bayes_linear_backward(
    grad_y: Tensor, grad_kl: Tensor | None, x: Tensor, weight_mu: Tensor, weight_rho: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the operator of this name. W is drawn in each of both passes: neither would be faster for a stored one."""
    *passed_on, needs_x, needs_weight = rest
    *_, seed, sample, weight_address, _ = passed_on
    grad_x = grad_y.new_empty(0)
    if needs_x:
        grad_x = bayes_linear_backward_input(grad_y, weight_mu, weight_rho, seed, sample, weight_address)
    if not needs_weight:
        nothing = None, None
        return grad_x, *new_gradients(nothing, weight_mu), *new_gradients(nothing, weight_mu)
    return grad_x, *bayes_linear_backward_weight(grad_y, grad_kl, x, weight_mu, weight_rho, *passed_on)

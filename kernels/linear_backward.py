"""The gradients of y = x W^T + b: those of the input and those of the parameters, as far as they are wanted."""

from collections.abc import Sequence

from torch import Tensor

from fusedbayes.kernels.linear_backward_input import bayes_linear_backward_input
from fusedbayes.kernels.linear_backward_weight import bayes_linear_backward_weight


def bayes_linear_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
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
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the operator of this name. W is drawn in each of both passes: neither would be faster for a stored one."""
    grad_x = grad_y.new_empty(0)
    if needs_x:
        grad_x = bayes_linear_backward_input(grad_y, weight_mu, weight_rho, seed, sample, weight_address)
    if not needs_weight:
        absent = [weight_mu.new_empty(0) for _ in range(4)]
        return grad_x, absent[0], absent[1], absent[2], absent[3]
    weight = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    noise = (seed, sample, weight_address, bias_address)
    return grad_x, *bayes_linear_backward_weight(grad_y, grad_kl, x, *weight, *bias, *noise)

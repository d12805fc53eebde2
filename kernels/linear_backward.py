"""The gradients of `linear`: those of the input and those of the parameters, as far as they are wanted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedbayes.kernels.config import MatmulConfig, fits
from fusedbayes.kernels.launch import Parameter, allow_tf32, capability
from fusedbayes.kernels.linear_backward_input import bayes_linear_backward_input
from fusedbayes.kernels.linear_backward_pair import pair_gradients
from fusedbayes.kernels.linear_backward_weight import weight_gradients
from fusedbayes.kernels.parameter import Gradients, new_gradients
from fusedbayes.kernels.sample_backward import sample_layer_backward
from fusedbayes.kernels.second_operands import Operands, backward_operands
from fusedbayes.kernels.select import select_config
from fusedbayes.kernels.streams import batch_of, sample_after

# Batch rows beyond which the library sums dY for the bias. In the kernel few programs do it, 16 rows at a time, while
# the others work; with a long batch they would be the last.
LONG_BATCH = 512

Key = tuple[Tensor, Tensor | None]
Addresses = tuple[Sequence[int], Sequence[int]]


def _product(grad_y: Tensor, x: Tensor) -> Tensor:
    """dY^T X by the library, not rounded to 16 bits on the way to fp32 gradients."""
    if grad_y.is_cuda and grad_y.dtype != torch.float32:
        return torch.mm(grad_y.t(), x, out_dtype=torch.float32)
    return grad_y.t().float() @ x.float()


def _bias_sums(grad_y: Tensor, num_samples: int) -> Tensor:
    """What is added up to dL/db of each Monte Carlo sample: dY, or for a long batch its sums (num_samples, N)."""
    rows = grad_y.shape[0]
    if rows <= LONG_BATCH * num_samples:
        return grad_y
    return grad_y.unflatten(0, (num_samples, rows // num_samples)).sum(1, dtype=torch.float32)


def _in_two_passes(
    operands: Operands,
    bias_sums: tuple[Tensor, Tensor],
    grad_kl: Tensor | None,
    weight: Parameter,
    bias: Sequence[Tensor | None],
    key: Key,
    addresses: Addresses,
    num_samples: int,
    estimator: str,
) -> tuple[Gradients, Gradients]:
    """The library's products for each Monte Carlo sample, and after them a pass over the weights."""
    # Samples are added up in fp32.
    dtype = weight[0].dtype if num_samples == 1 else torch.float32
    grads, bias_grads = (new_gradients(parameter, weight[0], dtype) for parameter in (weight, bias))
    for index in range(num_samples):
        grad_y, x, second_grad, second_x = (batch_of(tensor, index, num_samples) for tensor in operands)
        product = _product(grad_y, x)
        sample_layer_backward(
            (grads, bias_grads),
            (product, None if estimator == "shared" else _product(second_grad, second_x)),
            (batch_of(bias_sums[0], index, num_samples), batch_of(bias_sums[1], index, num_samples)),
            grad_kl if index == 0 else None,
            weight,
            bias,
            (key[0], sample_after(key, index)),
            addresses,
            estimator,
            add=index > 0,
        )
    return _rounded(grads, weight[0]), _rounded(bias_grads, weight[0])


def _rounded(grads: Gradients, like: Tensor) -> Gradients:
    return Gradients(*(grad.to(like.dtype) for grad in grads))


def bayes_linear_backward_weight(
    operands: Operands,
    grad_kl: Tensor | None,
    weight: Parameter,
    bias: Sequence[Tensor | None],
    key: Key,
    addresses: Addresses,
    num_samples: int,
    estimator: str,
    config: MatmulConfig | None = None,
) -> tuple[Gradients, Gradients]:
    """dmu and drho of weight and bias, in one pass where that is possible."""
    rows, x = operands.x.shape[0], operands.x
    shape = (rows // num_samples, *weight[0].shape)
    options = x.dtype, capability(x), allow_tf32(), num_samples, estimator
    config = config or select_config("backward_weight", shape, *options)
    sums = operands.grad_y, operands.second_grad
    if bias[0] is not None:
        sums = _bias_sums(operands.grad_y, num_samples), operands.second_grad
        if estimator == "local":
            sums = sums[0], _bias_sums(operands.second_grad, num_samples)
    arguments = grad_kl, weight, bias, key, addresses
    if not (config.single_pass and fits("backward_weight", config, shape) and addresses[0][2] % 4 == 0):
        return _in_two_passes(operands, sums, *arguments, num_samples, estimator)
    if estimator == "shared" and num_samples == 1:
        return weight_gradients(operands, sums[0], *arguments, config)
    return pair_gradients(operands, sums, *arguments, num_samples, estimator, config)


def bayes_linear_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    slope: Tensor,
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
    num_samples: int,
    estimator: str,
    needs_x: bool,
    needs_weight: bool,
    config: MatmulConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the operator of this name. W is drawn in each of both passes: neither would be faster for a stored one.

    Args:
        config: of both passes, in place of those that are selected.
    """
    weight = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    key, addresses = (seed, sample), (weight_address, bias_address)
    operands = backward_operands(grad_y, slope, x, key, weight_address, num_samples, estimator)
    # Without noise of the weights all samples are one batch.
    how = 1 if estimator == "local" else num_samples, estimator, config
    grad_x, grads, bias_grads = grad_y.new_empty(0), *(new_gradients((None, None), weight_mu) for _ in range(2))
    if needs_x:
        grad_x = bayes_linear_backward_input(operands, weight_mu, weight_rho, key, weight_address, *how)
    if needs_weight:
        grads, bias_grads = bayes_linear_backward_weight(operands, grad_kl, weight, bias, key, addresses, *how)
    return grad_x, *grads, *bias_grads

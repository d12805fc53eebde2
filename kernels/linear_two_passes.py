"""y = x W^T + b for large batches: what is multiplied is drawn to memory once, and the library multiplies."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedbayes.kernels.combine import combine
from fusedbayes.kernels.launch import Parameter
from fusedbayes.kernels.sample import sample_layer
from fusedbayes.kernels.second_operands import second_operands
from fusedbayes.kernels.streams import batch_of, sample_after


def linear_in_two_passes(
    x: Tensor,
    weight: Parameter,
    bias: Sequence[Tensor | None],
    key: tuple[Tensor, Tensor | None],
    addresses: tuple[Sequence[int], Sequence[int]],
    num_samples: int,
    same_input: bool,
    estimator: str,
    with_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples what is multiplied, once for each Monte Carlo sample, and has the library multiply."""
    rows = num_samples * x.shape[0] if same_input else x.shape[0]
    if same_input and estimator != "local":  # whose products are the same for all samples
        x = x.repeat(num_samples, 1)
    y, mu, bias_mu = x.new_empty(rows, weight[0].shape[0]), weight[0], bias[0]
    first, second, second_x, pair = y, y, x, estimator != "shared"
    batches = 1 if estimator == "local" else num_samples
    if pair:
        second_x, _ = second_operands(x, None, None, key, addresses[0], batches, estimator)
        shape = x.shape[0], y.shape[1]
        first, second, mu = x.new_empty(shape), second_x.new_empty(shape), mu.to(x.dtype)
    total = None
    for index in range(batches):
        drawn = key[0], sample_after(key, index)
        charged = with_kl and index == 0
        sampled, sampled_bias, kl = sample_layer(weight, bias, drawn, addresses, second_x.dtype, charged, estimator)
        assert sampled is not None
        total = kl if total is None else total
        of_second, of_mean = sampled_bias, bias_mu
        if estimator == "flipout":
            of_second, of_mean = None, sampled_bias
        out, operand = batch_of(second, index, batches), batch_of(second_x, index, batches)
        _multiply(out, operand, sampled, of_second)
        if pair:
            _multiply(batch_of(first, index, batches), batch_of(x, index, batches), mu, of_mean)
    assert total is not None
    if not pair:
        return y, total, x.new_empty(0, num_samples)
    return y, total, combine(y, first[None], second[None], key, addresses[0], num_samples, estimator)


def _multiply(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out = x W^T + b."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias.to(out.dtype), x, weight.t(), out=out)

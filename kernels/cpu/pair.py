"""What the estimators of two products need beside those: their operands, and the output made of both.

"local": y = x mu^T + sqrt(x^2 (sigma^2)^T) * zeta. "flipout": y = x mu^T + ((x * r) (sigma eps)^T) * s. These are small
tensors, of batch rows: PyTorch's operations on noise that the C++ draws.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedbayes.kernels.cpu.sample import normal, words
from fusedbayes.kernels.streams import FLIPOUT_INPUT, FLIPOUT_OUTPUT, LOCAL, sample_after


class RowNoise(NamedTuple):
    """Which noise rows have: seed and first sample, the weight's address, how many samples of how many rows each."""

    key: tuple[Tensor, Tensor | None]
    address: Sequence[int]
    num_samples: int
    rows: int


def second_operands(
    x: Tensor, grad_y: Tensor | None, slope: Tensor | None, noise: RowNoise, estimator: str
) -> tuple[Tensor, Tensor | None]:
    """What takes the place of x (rows, K) and of dY (rows, N) in the product with what is sampled."""
    if estimator == "local":
        return x.square(), None if grad_y is None or slope is None else grad_y * slope
    return _flip(x, noise, FLIPOUT_INPUT), None if grad_y is None else _flip(grad_y, noise, FLIPOUT_OUTPUT)


def combine(mean: Tensor, second: Tensor, noise: RowNoise, estimator: str) -> tuple[Tensor, Tensor]:
    """y (rows, N) from both products, and the slope; "local" takes products of one batch for all samples, too.

    The results may take the place of the products.
    """
    if estimator == "flipout":
        return mean.add_(_flip(second, noise, FLIPOUT_OUTPUT)), mean.new_empty(0, noise.num_samples)
    key, (stream, row_offset, _), num_samples, M = noise
    N, address = mean.shape[1], (stream + LOCAL, 0, row_offset)
    zetas = [normal(M, N, key[0], sample_after(key, index), address) for index in range(num_samples)]
    batches = num_samples if len(mean) == num_samples * M else 1
    zeta, std = torch.stack(zetas), second.float().sqrt_().view(batches, M, N)
    # Not the view of another tensor: what autograd gets from us must be free to be written to.
    y = torch.empty(num_samples * M, N, dtype=torch.float32, device="cpu")
    torch.addcmul(mean.float().view(batches, M, N), std, zeta, out=y.view(num_samples, M, N))
    # Where nothing varies the output has no derivative by its variance: 0.
    slope = zeta.div_(2.0 * std).masked_fill_(std == 0.0, 0.0)
    return y.to(mean.dtype), slope.flatten(0, 1).to(mean.dtype)


def input_gradient(
    grad_y: Tensor, by_second: Tensor, x: Tensor, weight_mu: Tensor, noise: RowNoise, estimator: str
) -> Tensor:
    """dX from dY and the gradient by the second product's operand, whose place it may take."""
    chained = by_second.mul_(x).mul_(2.0) if estimator == "local" else _flip(by_second, noise, FLIPOUT_INPUT)
    return chained.addmm_(grad_y, weight_mu.to(grad_y.dtype))


def _flip(tensor: Tensor, noise: RowNoise, role: int) -> Tensor:
    """The tensor (rows, columns) with the random signs of its rows and columns."""
    key, (stream, row_offset, column_offset), num_samples, rows = noise
    columns = tensor.shape[1]
    offset = column_offset if role == FLIPOUT_INPUT else row_offset
    # A word for 32 columns: as addressed, the word of one column of a tensor with a 32nd of them.
    first, end = offset // 32, -(-(offset + columns) // 32)
    bits = torch.arange(32, dtype=torch.int32, device="cpu")
    negative = [
        (words(rows, end - first, key[0], sample_after(key, index), (stream + role, 0, first))[..., None] >> bits) & 1
        for index in range(num_samples)
    ]
    signs = (
        torch.cat(negative)
        .view(len(tensor), 32 * (end - first))[:, offset - 32 * first :][:, :columns]
        .to(tensor.dtype)
        .mul_(-2.0)
        .add_(1.0)
    )
    return signs.mul_(tensor)

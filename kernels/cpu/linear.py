"""y = x W^T + b and its gradients on the CPU: W is drawn in blocks, each multiplied while it is in the cache."""

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fusedbayes.kernels.cpu.native import Output, library
from fusedbayes.kernels.cpu.sample import Key, Parameter, kl_tensor, make_problem, sample_weight_backward

# Weights of a block: 4 MiB in fp32, small enough for the cache, large enough for an efficient product.
BLOCK = 1 << 20


class _Workspace(threading.local):
    """Each thread's memory for a block of W, kept: fresh memory costs as much time as drawing the block."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, Tensor] = {}

    def block(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory until the thread asks for the next block; more than BLOCK weights' is not kept."""
        if rows * columns > BLOCK:
            return torch.empty(rows, columns, dtype=dtype)
        if dtype not in self._memory:
            self._memory[dtype] = torch.empty(BLOCK, dtype=dtype)
        return self._memory[dtype].as_strided((rows, columns), (columns, 1))


_workspace = _Workspace()


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cuts the rows of a weight into blocks of at most BLOCK weights, if a row has no more; one block at least."""
    step = max(1, BLOCK // max(columns, 1))
    for first in range(0, max(rows, 1), step):
        yield slice(first, min(first + step, rows))


def _part(tensor: Tensor, dim: int, rows: slice) -> Tensor:
    """What belongs to a block of W's rows; for the only block the tensor itself, since views cost time too."""
    size = rows.stop - rows.start
    return tensor if size == tensor.shape[dim] else tensor.narrow(dim, rows.start, size)


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
    """y, and the KL of weight and bias."""
    N, K = weight_mu.shape
    kl, bias = 0.0, None
    if bias_mu is not None and bias_rho is not None:
        bias = x.new_empty(N)
        parameter = Parameter(bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
        problem = make_problem(parameter, Key(seed, sample, bias_address), with_kl=with_kl)
        kl = library().forward(problem, Output.WEIGHT, bias)
    parameter = Parameter(weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    problem = make_problem(parameter, Key(seed, sample, weight_address), with_kl=with_kl)
    y = x.new_empty(x.shape[0], N)
    for rows in _blocks(N, K):
        weight = _workspace.block(rows.stop - rows.start, K, x.dtype)
        kl += library().forward(problem, Output.WEIGHT, weight, rows)
        if bias is None:
            torch.mm(x, weight.t(), out=_part(y, 1, rows))
        else:
            torch.addmm(_part(bias, 0, rows), x, weight.t(), out=_part(y, 1, rows))
    return y, kl_tensor(kl, weight_mu, with_kl)


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
    """dX = dY W, and dmu and drho of weight and bias from dY^T X and the sum of dY; the noise is drawn once for all."""
    N, K = weight_mu.shape
    grad_x = grad_y.new_empty(x.shape if needs_x else 0)
    key = Key(seed, sample, weight_address)
    parameter = Parameter(weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    if needs_weight:
        grad_mu, grad_rho = weight_mu.new_empty(N, K), weight_rho.new_empty(N, K)
        # dmu takes the place of dY^T X: the C++ reads an element before it writes it.
        grad_weight = grad_mu if grad_mu.dtype == x.dtype else x.new_empty(N, K)
        problem = make_problem(
            parameter, key, grad_kl=grad_kl, grad_weight=grad_weight, grad_mu=grad_mu, grad_rho=grad_rho
        )
    else:
        grad_mu, grad_rho = weight_mu.new_empty(0), weight_rho.new_empty(0)
        problem = make_problem(parameter, key)
    # Sums of many blocks' dY W must not be rounded to 16 bits in between: one block then.
    for rows in _blocks(N, K) if grad_y.dtype == torch.float32 else (slice(0, N),):
        weight = _workspace.block(rows.stop - rows.start, K, grad_y.dtype) if needs_x else None
        grad_rows = _part(grad_y, 1, rows)
        if needs_weight:
            torch.mm(grad_rows.t(), x, out=_part(grad_weight, 0, rows))
            library().backward(problem, weight, rows)
        elif weight is not None:
            library().forward(problem, Output.WEIGHT, weight, rows)
        if weight is not None and rows.start == 0:
            torch.mm(grad_rows, weight, out=grad_x)
        elif weight is not None:
            grad_x.addmm_(grad_rows, weight)
    if not needs_weight or bias_mu is None or bias_rho is None:
        return grad_x, grad_mu, grad_rho, weight_mu.new_empty(0), weight_mu.new_empty(0)
    grad_bias = grad_y.sum(0, dtype=torch.float32)
    bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    bias_grads = sample_weight_backward(grad_bias, grad_kl, *bias, seed, sample, bias_address)
    return grad_x, grad_mu, grad_rho, *bias_grads

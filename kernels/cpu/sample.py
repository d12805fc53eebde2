"""Sampling, KL and their gradients on the CPU: how tensors become the C++'s arguments."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedbayes.kernels.cpu.native import (
    ABSENT,
    GRADIENTS,
    PARAMETER,
    Output,
    Problem,
    by_rows,
    library,
    operand,
    pointer,
)


class Parameter(NamedTuple):
    """A random tensor; its priors may be missing, or single numbers."""

    mu: Tensor
    rho: Tensor
    prior_mu: Tensor | None
    prior_sigma: Tensor | None


# Which noise a tensor has: seed, sample, which may be missing for 0, and address.
Key = tuple[Tensor, Tensor | None, Sequence[int]]


def make_problem(
    parameter: Parameter,
    key: Key | None,
    *,
    with_kl: bool = False,
    grad_kl: Tensor | None = None,
    grad_product: Tensor | None = None,
    grad_mu: Tensor | None = None,
    grad_rho: Tensor | None = None,
    accumulate: bool = False,
    mixture: Tensor | None = None,
    noise_rows: Tensor | None = None,
) -> Problem:
    """The C++'s view of a parameter; a vector is one row.

    Args:
        parameter: (rows, columns), or a vector; float32 or bfloat16.
        key: its noise, if any is drawn.
        with_kl: whether the KL is computed.
        grad_kl: 0-d cotangent of the KL, whose gradient is computed if there is a prior.
        grad_product: of the parameter's shape, dL/dW, or in the other estimators what multiplies mu has of dL/dW. Of a
            vector it may be a matrix, whose rows are added up; then so are those of the backward pass's grad_sampled.
        grad_mu, grad_rho: where the gradients are written, contiguous. Without them, and without a mixture, nothing
            else of the gradients counts.
        accumulate: whether they are added to what is there.
        mixture: a scale mixture that is the prior instead, as `mixture.prepared`.
        noise_rows: int64, of each of the parameter's rows the row of the noise; None for 0, 1, 2, ...
    """
    mu, rho, prior_mu, prior_sigma = parameter
    shape = mu.shape
    rows, columns = shape if len(shape) == 2 else (1, mu.numel())
    mu, mu_words = by_rows(mu)
    rho, rho_words = by_rows(rho)
    scalar_prior, prior = False, _NO_PRIOR
    if prior_mu is None or prior_sigma is None or not (with_kl or grad_kl is not None):
        prior_mu = prior_sigma = None
        grad_kl = None if mixture is None else grad_kl
    elif prior_mu.dim() == prior_sigma.dim() == 0:
        prior_mu, prior_sigma, scalar_prior = _as_float(prior_mu), _as_float(prior_sigma), True
        prior = (pointer(prior_mu), *_NUMBER, pointer(prior_sigma), *_NUMBER)
    else:
        (prior_mu, mu_of_prior), (prior_sigma, sigma_of_prior) = (
            by_rows(given.expand(shape)) for given in (prior_mu, prior_sigma)
        )
        prior = mu_of_prior + sigma_of_prior
    noise = _NO_NOISE
    if key is not None:
        seed, sample, address = key
        noise = (pointer(seed), pointer(sample), *address, pointer(noise_rows))
    words = PARAMETER.pack(columns, scalar_prior, *mu_words, *rho_words, *prior, *noise)
    if grad_mu is None and mixture is None:
        return rows, words + _NO_GRADIENTS, (mu, rho, prior_mu, prior_sigma, key, noise_rows)
    product, summed_rows = ABSENT, -1
    if grad_kl is not None:
        grad_kl = _as_float(grad_kl)
    if grad_product is not None:
        grad_product, product = by_rows(grad_product)
        if len(shape) == 1 and grad_product.dim() == 2:
            summed_rows = grad_product.shape[0]
    results = *operand(grad_mu), *operand(grad_rho)
    words += GRADIENTS.pack(pointer(grad_kl), *product, *results, summed_rows, accumulate, pointer(mixture))
    gradients = grad_kl, grad_product, grad_mu, grad_rho, mixture
    return rows, words, (mu, rho, prior_mu, prior_sigma, key, noise_rows, *gradients)


_NUMBER = (0, 0, 0, 0)  # what `operand` says of a number in float32 beside its address
_NO_PRIOR: tuple[int, ...] = ABSENT * 2
_NO_NOISE: tuple[int, ...] = (0,) * 6
_NO_GRADIENTS = GRADIENTS.pack(0, *ABSENT * 3, -1, 0, 0)


def _as_float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float32 else tensor.float()


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
    """W and its KL."""
    parameter, weight = Parameter(mu, rho, prior_mu, prior_sigma), library().new_result(mu, dtype)
    problem = make_problem(parameter, (seed, sample, address), with_kl=with_kl)
    return weight, kl_tensor(library().forward(problem, Output.WEIGHT, weight), mu, with_kl)


def normal(
    rows: Tensor | int,
    columns: int,
    seed: Tensor,
    sample: Tensor | None,
    address: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """eps of these rows, or of so many: `fusedbayes.noise.normal` to 1e-5."""
    return _noise(Output.NORMAL, torch.float32, rows, columns, (seed, sample, address)).to(dtype)


def signs(
    rows: Tensor, columns: int, seed: Tensor, sample: Tensor | None, address: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Likewise `fusedbayes.noise.signs`."""
    return _noise(Output.SIGN, torch.float32, rows, columns, (seed, sample, address)).to(dtype)


def words(rows: Tensor | int, columns: int, seed: Tensor, sample: Tensor | None, address: Sequence[int]) -> Tensor:
    """Likewise the word of each column as int32, the bits of `fusedbayes.noise.philox_words`."""
    return _noise(Output.WORD, torch.int32, rows, columns, (seed, sample, address))


def _noise(kind: Output, dtype: torch.dtype, rows: Tensor | int, columns: int, key: Key) -> Tensor:
    count = rows.shape[0] if isinstance(rows, Tensor) else rows
    out = torch.empty((count, columns), dtype=dtype, device="cpu")
    noise_rows = rows.contiguous() if isinstance(rows, Tensor) else None
    # Neither mean nor deviation is read.
    library().forward(make_problem(Parameter(out, out, None, None), key, noise_rows=noise_rows), kind, out)
    return out


def weight_kl(mu: Tensor, rho: Tensor, prior_mu: Tensor | None, prior_sigma: Tensor | None) -> Tensor:
    """The KL summed over the weights, in float32."""
    problem = make_problem(Parameter(mu, rho, prior_mu, prior_sigma), None, with_kl=True)
    return kl_tensor(library().forward(problem, Output.NONE), mu, True)


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
    """dmu and drho."""
    parameter = Parameter(mu, rho, prior_mu, prior_sigma)
    key = None if seed is None or grad_weight is None else (seed, sample, address)
    grads = library().new_result(mu), library().new_result(rho)
    problem = make_problem(
        parameter,
        key,
        grad_kl=grad_kl,
        grad_mu=grads[0],
        grad_rho=grads[1],
        grad_product=None if key is None else grad_weight,
    )
    library().backward(problem)
    return grads


def kl_tensor(kl: float, mu: Tensor, with_kl: bool) -> Tensor:
    """The KL as operators return it; without one, a tensor that has no element."""
    return mu.new_full((), kl, dtype=torch.float32) if with_kl else mu.new_empty(0, dtype=torch.float32)

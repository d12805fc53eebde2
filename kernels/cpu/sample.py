"""Sampling, KL and their gradients on the CPU: how tensors become the C++'s arguments."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedbayes.kernels.cpu.native import Output, Problem, library


class Parameter(NamedTuple):
    """A random tensor; its priors may be missing, or single numbers."""

    mu: Tensor
    rho: Tensor
    prior_mu: Tensor | None
    prior_sigma: Tensor | None


class Key(NamedTuple):
    """Which noise a tensor has; the sample may be missing, for 0."""

    seed: Tensor
    sample: Tensor | None
    address: Sequence[int]


def make_problem(
    parameter: Parameter,
    key: Key | None,
    *,
    with_kl: bool = False,
    grad_kl: Tensor | None = None,
    **tensors: Tensor | None,
) -> Problem:
    """The C++'s view of all rows of a parameter; a vector is one row.

    Args:
        parameter: (rows, columns), or a vector; float32 or bfloat16.
        key: its noise, if any is drawn.
        with_kl: whether the KL is computed.
        grad_kl: 0-d cotangent of the KL, whose gradient is computed if there is a prior.
        tensors: the other operands by their names in `Problem`, contiguous where they are written.
    """
    mu, rho, prior_mu, prior_sigma = parameter
    rows, columns = mu.shape if mu.dim() == 2 else (1, mu.numel())
    problem = Problem(rows=rows, columns=columns)
    tensors |= {"mu": mu, "rho": rho}
    with_gradient = grad_kl is not None and prior_mu is not None
    if with_kl or with_gradient:
        assert prior_mu is not None
        assert prior_sigma is not None
        problem.scalar_prior = prior_mu.dim() == prior_sigma.dim() == 0
        for name, prior in (("prior_mu", prior_mu), ("prior_sigma", prior_sigma)):
            tensors[name] = prior.float() if problem.scalar_prior else prior.expand(mu.shape)
    problem.set_operands(tensors)
    if grad_kl is not None and with_gradient:
        problem.set_grad_kl(grad_kl)
    if key is not None:
        problem.set_noise(*key)
    return problem


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
    parameter, weight = Parameter(mu, rho, prior_mu, prior_sigma), mu.new_empty(mu.shape, dtype=dtype)
    problem = make_problem(parameter, Key(seed, sample, address), with_kl=with_kl, weight=weight)
    return weight, kl_tensor(library().forward(problem, Output.WEIGHT), mu, with_kl)


def weight_variance(
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
    dtype: torch.dtype,
    with_kl: bool,
) -> tuple[Tensor, Tensor]:
    """sigma^2, of mu's shape in `dtype`, and the KL: what local reparameterisation multiplies x^2 with."""
    parameter, variance = Parameter(mu, rho, prior_mu, prior_sigma), mu.new_empty(mu.shape, dtype=dtype)
    problem = make_problem(parameter, None, with_kl=with_kl, weight=variance)
    return variance, kl_tensor(library().forward(problem, Output.VARIANCE), mu, with_kl)


def normal(shape: tuple[int, int], seed: Tensor, sample: Tensor | None, address: Sequence[int]) -> Tensor:
    """eps, float32: `fusedbayes.noise.normal` to 1e-5."""
    return _noise(torch.empty(shape), Output.NORMAL, Key(seed, sample, address))


def words(shape: tuple[int, int], seed: Tensor, sample: Tensor | None, address: Sequence[int]) -> Tensor:
    """The word of each column as int32, the bits of `fusedbayes.noise.philox_words`."""
    return _noise(torch.empty(shape, dtype=torch.int32), Output.WORD, Key(seed, sample, address))


def _noise(out: Tensor, kind: Output, key: Key) -> Tensor:
    # Neither mean nor deviation is read.
    problem = make_problem(Parameter(out, out, None, None), key, weight=out)
    library().forward(problem, kind)
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
    key = None if seed is None or grad_weight is None else Key(seed, sample, address)
    grads = mu.new_empty(mu.shape), rho.new_empty(rho.shape)
    problem = make_problem(
        parameter,
        key,
        grad_kl=grad_kl,
        grad_mu=grads[0],
        grad_rho=grads[1],
        grad_weight=None if key is None else grad_weight,
    )
    library().backward(problem)
    return grads


def kl_tensor(kl: float, mu: Tensor, with_kl: bool) -> Tensor:
    """The KL as operators return it; without one, a tensor that has no element."""
    return mu.new_full((), kl, dtype=torch.float32) if with_kl else mu.new_empty(0, dtype=torch.float32)

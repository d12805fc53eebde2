"""A Gaussian parameter as one argument of a kernel: how it gets there, and how a kernel reads it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Gaussian(NamedTuple):
    """A parameter's tensors for a launch, and the pointers to them in a kernel, row-major.

    Attributes:
        mu, rho: of one shape; None for a layer without a bias.
        prior_mu, prior_sigma: each like mu or of a single element; None if nobody asks for the KL.
        PRIOR_MU_SCALAR, PRIOR_SIGMA_SCALAR: whether they are of a single element; constants of the kernel.
    """

    mu: Any
    rho: Any
    prior_mu: Any = None
    prior_sigma: Any = None
    PRIOR_MU_SCALAR: Any = tl.constexpr(True)
    PRIOR_SIGMA_SCALAR: Any = tl.constexpr(True)


class Gradients(NamedTuple):
    """Where the gradients of mu and rho go."""

    mu: Any
    rho: Any


def new_gradients(parameter: Sequence[Tensor | None], like: Tensor, dtype: torch.dtype | None = None) -> Gradients:
    """For mu and rho, by default of `like`'s dtype; without an element if there is no parameter."""
    mu = parameter[0]
    shape = (0,) if mu is None else mu.shape
    return Gradients(*(like.new_empty(shape, dtype=dtype) for _ in range(2)))


def gaussian(parameter: Sequence[Tensor | None]) -> Gaussian:
    """The argument for mu, rho and, if they matter, prior_mu and prior_sigma."""
    mu, rho, *priors = (None if tensor is None else tensor.contiguous() for tensor in parameter)
    return Gaussian(mu, rho, *priors, *(tl.constexpr(prior is None or prior.dim() == 0) for prior in priors))


@triton.jit
def load_elements(ptr, offsets, exist, other: tl.constexpr):
    """The elements at `offsets`, `other` where none exists; without a mask if `exist` is None."""
    if exist is None:
        elements = tl.load(ptr + offsets)
    else:
        elements = tl.load(ptr + offsets, mask=exist, other=other)
    return elements


@triton.jit
def open_prior(parameter, start):
    """The prior's mean and deviation as `prior_at` takes them: a number, or a pointer to the one at element `start`."""
    if parameter.PRIOR_MU_SCALAR:
        mu = tl.load(parameter.prior_mu).to(tl.float32)
    else:
        mu = parameter.prior_mu + start
    if parameter.PRIOR_SIGMA_SCALAR:
        sigma = tl.load(parameter.prior_sigma).to(tl.float32)
    else:
        sigma = parameter.prior_sigma + start
    return mu, sigma


@triton.jit
def prior_at(prior, offsets, exist):
    """The prior's mean and deviation at `offsets`, in fp32: each a number, or elements."""
    mu, sigma = prior
    if mu.dtype.is_ptr():
        mu = load_elements(mu, offsets, exist, 0.0).to(tl.float32)
    if sigma.dtype.is_ptr():
        sigma = load_elements(sigma, offsets, exist, 1.0).to(tl.float32)
    return mu, sigma

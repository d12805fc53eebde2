"""Random layers in the operators' argument order, and checks of kernels on them with derived tolerances."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fusedbayes import kernels, reference
from fusedbayes.kernels import MatmulConfig
from fusedbayes.noise import Address
from fusedbayes.reference import Estimator

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
PRIORS = ("none", "scalar", "per-weight", "mixed")

# What one product of the problems below may be off by, against exact arithmetic on the same inputs. In fp32 it is the
# 1e-5 by which the backends' noise may differ times sigma, about 0.2; in 16 bits the rounding of W to x's dtype.
ERROR_OF_A_PRODUCT = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# The KL of a weight has terms of order ten (a logarithm, a square) and four roundings.
ERROR_OF_A_KL = 40 * 2.0**-24
# From the smallest sigma to the largest; exp overflows in fp32 at 89, is subnormal at -88 and underflows at -104.
EXTREME_RHO = (-1e4, -745.0, -200.0, -104.0, -89.0, -88.0, -87.0, -20.0, 0.0, 19.0, 21.0, 88.0, 89.0, 200.0, 1e4)

# Counters (quad, row, sample, stream) whose words under the seed 0 are at the ends of their range (Philox run backwards
# finds them), and their normals: radius sqrt(66 ln 2) where a word is 0, and 0 where its uniform rounds to 1.
EXTREME_WORDS = {
    (0xD3701535, 0x0D77C408, 0xB13FDBBA, 0x0F37F464): (0, 2**31, 2**32 - 1, 2**31 - 1),
    (0x82C6722C, 0x0A761ED6, 0x88970086, 0x82BE9B9B): (2**32 - 1, 0, 0, 2**30),
}
EXTREME_NORMALS = ((-math.sqrt(66 * math.log(2)), 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, math.sqrt(66 * math.log(2))))

# Of scale mixtures: pi, sigma_1 and sigma_2, the same in float32 as in float64. Sigmas of about 0.15 are between them.
MIXTURE = 0.375, 0.75, 0.0625

Parameter = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Key = tuple[Tensor, Tensor | None, Sequence[int]]  # seed, sample, address


class Problem(NamedTuple):
    """The arguments of torch.ops.fusedbayes.bayes_linear, and cotangents of its results."""

    x: Tensor
    weight: Parameter  # mu, rho, prior_mu, prior_sigma
    bias: Parameter
    seed: Tensor
    sample: Tensor | None
    weight_address: Address
    bias_address: Address
    num_samples: int
    estimator: Estimator
    with_kl: bool
    grad_y: Tensor
    grad_kl: Tensor | None
    slope: Tensor  # what the forward pass keeps

    @property
    def noise(self) -> tuple[Tensor, Tensor | None, Address]:
        """Which noise the weight has, as the operators take it."""
        return self.seed, self.sample, self.weight_address

    @property
    def forward(self) -> tuple[Any, ...]:
        """Arguments of bayes_linear."""
        how = self.bias_address, self.num_samples, False, self.estimator, self.with_kl
        return (self.x, *self.weight, *self.bias, *self.noise, *how)

    def sample_weight(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Arguments of sample_weight."""
        return (*self.weight, *self.noise, dtype, self.with_kl)

    @property
    def scale_mixture_kl(self) -> tuple[Any, ...]:
        """Arguments of scale_mixture_kl."""
        mu, rho, *_ = self.weight
        dtype = reference.compute_dtype(mu)
        return mu, rho, *(torch.tensor(number, dtype=dtype, device=mu.device) for number in MIXTURE), *self.noise

    @property
    def scale_mixture_kl_backward(self) -> tuple[Any, ...]:
        """Arguments of scale_mixture_kl_backward, for a cotangent of 1."""
        _, _, pi, *_ = self.scale_mixture_kl
        return torch.ones_like(pi), *self.scale_mixture_kl

    def backward_of(self, needs_x: bool, needs_weight: bool) -> tuple[Any, ...]:
        """Arguments of bayes_linear_backward."""
        given = self.grad_y, self.grad_kl, self.slope, self.x
        how = self.bias_address, self.num_samples, self.estimator, needs_x, needs_weight
        return (*given, *self.weight, *self.bias, *self.noise, *how)

    @property
    def backward(self) -> tuple[Any, ...]:
        """For the gradients of everything."""
        return self.backward_of(True, True)

    @property
    def backward_input(self) -> tuple[Any, ...]:
        """For dX alone."""
        return self.backward_of(True, False)

    @property
    def backward_weight(self) -> tuple[Any, ...]:
        """For dmu and drho alone."""
        return self.backward_of(False, True)

    @property
    def operands(self) -> torch.dtype:
        """What the operands of the products are rounded to: the squares of fp16 would overflow, they are bf16."""
        of_squares = self.estimator == "local" and self.x.dtype == torch.float16
        return torch.bfloat16 if of_squares else self.x.dtype

    def map(self, function: Callable[[Tensor], Tensor]) -> "Problem":
        """The problem with `function` applied to each floating tensor."""

        def apply(value: Any) -> Any:
            if type(value) is tuple:
                return tuple(apply(item) for item in value)
            return function(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Problem(*(apply(value) for value in self))

    def to(self, device: str) -> "Problem":
        moved = self.map(lambda tensor: tensor.to(device))
        sample = None if self.sample is None else self.sample.to(device)
        return moved._replace(seed=self.seed.to(device), sample=sample)

    def exact(self) -> "Problem":
        """The same numbers on the CPU in float64, where the operators are PyTorch itself."""
        return self.to("cpu").map(Tensor.double)


def make_problem(
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype = torch.float32,
    prior: str = "mixed",
    bias: bool = True,
    with_kl: bool = True,
    sample: int | None = 2,
    weight_address: Address = Address(8),
    bias_address: Address = Address(9),
    num_samples: int = 1,
    estimator: Estimator = "shared",
) -> Problem:
    """Numbers of order one for (M, N, K) batch rows of a sample, outputs and inputs; sigma is about 0.15.

    Args:
        dtype: of x and grad_y.
        parameter_dtype: of mu, rho and the priors.
        prior: "none", "scalar", "per-weight", or "mixed": a scalar mean with a deviation for each weight.
        with_kl: whether the KL is computed, if there is a prior.
        sample: index of the Monte Carlo sample; None is the operators' shorthand for 0.
    """
    M, N, K = num_samples * shape[0], *shape[1:]
    with_kl = with_kl and prior != "none"
    problem = Problem(
        x=torch.randn(M, K, dtype=dtype),
        weight=make_parameter((N, K), parameter_dtype, prior),
        bias=make_parameter((N,), parameter_dtype, prior) if bias else (None,) * 4,
        seed=torch.tensor(-(2**62) - 12345),
        sample=None if sample is None else torch.tensor(sample),
        weight_address=weight_address,
        bias_address=bias_address,
        num_samples=num_samples,
        estimator=estimator,
        with_kl=with_kl,
        grad_y=torch.randn(M, N, dtype=dtype),
        grad_kl=torch.tensor(0.3, dtype=torch.promote_types(parameter_dtype, torch.float32)) if with_kl else None,
        slope=torch.empty(0, dtype=dtype),
    )
    *_, slope = torch.ops.fusedbayes.bayes_linear(*problem.exact().forward)
    return problem._replace(slope=slope.to(dtype))


def make_parameter(shape: tuple[int, ...], dtype: torch.dtype, prior: str) -> Parameter:
    mean_shape = shape if prior == "per-weight" else ()
    deviation_shape = () if prior == "scalar" else shape
    mu, rho = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) - 2
    if prior == "none":
        return mu, rho, None, None
    return mu, rho, torch.randn(mean_shape, dtype=dtype), 0.5 + torch.rand(deviation_shape, dtype=dtype)


def assert_close(actual: Tensor, expected: Tensor, *, terms: int, operands: torch.dtype) -> None:
    """Compares a sum of `terms` products with exact arithmetic.

    Errors of the terms add up like a random walk, of which four deviations are allowed; the result is rounded once.
    """
    torch.testing.assert_close(
        actual.cpu().double(),
        expected.double(),
        rtol=torch.finfo(actual.dtype).eps,
        atol=4 * ERROR_OF_A_PRODUCT[operands] * max(terms, 1) ** 0.5,
    )


def assert_kl_close(actual: Tensor, expected: Tensor, *, weights: int) -> None:
    """Compares a KL summed over `weights` in fp32 with exact arithmetic; errors add up like a random walk."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=2.0**-22, atol=4 * ERROR_OF_A_KL * weights**0.5)


def check_bayes_linear(problem: Problem, config: MatmulConfig | None, device: str) -> tuple[Tensor, Tensor]:
    """Compares y and KL of the launcher, run on `device`, with the operator in double precision, and returns them."""
    y, kl, slope = kernels.bayes_linear(*problem.to(device).forward, config=config)
    expected_y, expected_kl, expected_slope = torch.ops.fusedbayes.bayes_linear(*problem.exact().forward)
    assert y.dtype == slope.dtype == problem.x.dtype
    # Of zeta / (2 sqrt(v)), zeta is off by 1e-5. x^2 and sigma^2 in 16 bits are off by 2^-9 each, so is the slope.
    narrow = slope.dtype.itemsize == 2
    torch.testing.assert_close(
        slope.cpu().double(),
        expected_slope,
        rtol=2.0**-7 if narrow else 2.0**-20,
        atol=1e-5 * expected_slope.abs().max().item() if expected_slope.numel() else 0.0,
    )
    # One more term for the bias.
    assert_close(y, expected_y, terms=problem.x.shape[1] + 1, operands=problem.operands)
    if problem.with_kl:
        assert_kl_close(kl, expected_kl, weights=expected_y.shape[1] * (problem.x.shape[1] + 1))
    else:
        assert kl.shape == (0,)
    return y, kl


def check_input_gradient(problem: Problem, config: MatmulConfig | None, device: str) -> Tensor:
    """Likewise dX."""
    grad_x = kernels.bayes_linear_backward(*problem.to(device).backward_input, config=config)[0]
    expected, *_ = torch.ops.fusedbayes.bayes_linear_backward(*problem.exact().backward)
    assert grad_x.dtype == problem.grad_y.dtype
    assert_close(grad_x, expected, terms=problem.grad_y.shape[1], operands=problem.operands)
    return grad_x


def check_weight_gradients(problem: Problem, config: MatmulConfig | None, device: str) -> None:
    """Likewise dmu and drho of weight and bias."""
    _, *gradients = kernels.bayes_linear_backward(*problem.to(device).backward_weight, config=config)
    _, *expected = torch.ops.fusedbayes.bayes_linear_backward(*problem.exact().backward)
    for gradient, exact in zip(gradients, expected, strict=True):
        assert gradient.dtype == problem.weight[0].dtype
        assert gradient.shape == exact.shape
        # x and dY are given in their dtype and their products added in fp32: no 16-bit rounding on the way, but for
        # x^2 and dY times the slope.
        operands = problem.operands if problem.estimator == "local" else torch.float32
        assert_close(gradient, exact, terms=problem.x.shape[0], operands=operands)


def check_scale_mixture(
    mu: Tensor, rho: Tensor, mixture: Sequence[float], key: Key, launchers: Any, device: str
) -> None:
    """Compares KL and gradients by the launchers, run on `device`, with the operator in double precision.

    The noise may be off by 1e-5; w, log q and log p by a few roundings. d, the logarithm of the components' ratio, is
    the difference of two squares: it is off by roundings of these.
    """
    numbers = [torch.tensor(number) for number in mixture]
    seed, sample, address = key
    where = [None if t is None else t.to(device) for t in (*numbers, seed, sample)]
    arguments = mu.to(device), rho.to(device), *where, address
    exact = [tensor.double() for tensor in (mu, rho, *numbers)]
    one = torch.ones(())
    grads = launchers.scale_mixture_kl_backward(one.to(device), *arguments)
    exact_grads = torch.ops.fusedbayes.scale_mixture_kl_backward(one.double(), *exact, *key)

    sigma = reference.sigma_from_rho(exact[1])
    eps = reference.weight_noise(exact[0], seed, 0 if sample is None else sample, Address(*address))
    w, (pi, first, second) = exact[0] + sigma * eps, exact[2:]
    squares = (w / second).square(), (w / first).square()
    log_odds = (pi / (1.0 - pi) * second / first).log()
    share = torch.sigmoid(log_odds + 0.5 * (squares[0] - squares[1]))
    slope, gap = share / first.square() + (1.0 - share) / second.square(), second**-2.0 - first**-2.0
    both = share * (1.0 - share)
    error_of_w = 1e-5 * sigma + 2.0**-22 * w.abs()
    error_of_d = 2.0**-21 * (squares[0] + squares[1] + log_odds.abs() + 1.0)
    error = (slope + (gap * w).square() * both) * error_of_w + (gap * w).abs() * both * error_of_d
    error = error + 2.0**-20 * (w.abs() * slope)
    h = w.abs() * slope
    factor = torch.sigmoid(exact[1]) / sigma
    error_of_rho = factor * (sigma * (error * eps.abs() + h * 1e-5) + 2.0**-20 * (h * sigma * eps.abs() + 1.0))
    for grad, exact_grad, allowed in zip(grads, exact_grads, (error, error_of_rho), strict=True):
        assert grad.dtype == mu.dtype
        assert grad.shape == mu.shape
        # Rounded once to the dtype of the parameters.
        allowed = allowed + torch.finfo(grad.dtype).eps * exact_grad.abs() + 1e-30
        excess = ((grad.cpu().double() - exact_grad).abs() / allowed).nan_to_num(nan=torch.inf)
        assert excess.numel() == 0 or excess.max() <= 1.0, f"off by {excess.max():.3g} times what is allowed"

    kl = launchers.scale_mixture_kl(*arguments)
    expected = torch.ops.fusedbayes.scale_mixture_kl(*exact, *key)
    assert kl.dtype == torch.float32
    assert kl.shape == ()
    terms = torch.minimum(*squares) + sigma.log().abs() + eps.square() + log_odds.abs() + 10.0
    each = 1e-5 * (h * sigma + eps.abs()) + h * 2.0**-22 * w.abs() + 2.0**-22 * terms
    # Errors of the terms add up like a random walk, of which four deviations are allowed.
    allowed = 4.0 * each.square().sum().sqrt().item() + 2.0**-22 * expected.abs().item()
    assert abs(kl.item() - expected.item()) <= allowed, f"{kl.item()} instead of {expected.item()} +- {allowed:.2g}"

"""The CPU kernel: the operators of `fusedbayes.ops` in C++, one pass over the parameters each.

Each launcher takes and returns tensors like the operator of the same name, allocates its outputs and validates nothing.
Matrix products are the library's. The C++ is in fused.cpp and passes.h; `library` says whether it was built.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedbayes.kernels.cpu.library import TYPES, Library, Noise, Operand, Output, Problem, library, load

__all__ = [
    "Library",
    "bayes_linear",
    "bayes_linear_backward",
    "load",
    "normal",
    "sample_weight",
    "sample_weight_backward",
    "serves",
    "weight_kl",
    "weight_variance",
]

# mu, rho, prior_mu, prior_sigma; the priors may be missing, or single numbers.
Parameter = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
# Seed, Monte Carlo sample and address.
Key = tuple[Tensor, Tensor | None, Sequence[int]]


def serves(dtype: torch.dtype) -> bool:
    """Whether the kernel computes with tensors of this floating dtype: float32 and bfloat16."""
    return dtype in TYPES


class _Call:
    """A call of the C++: the structure it takes, and the tensors that have to live as long."""

    def __init__(self, parameter: Parameter, key: Key | None, with_kl: bool) -> None:
        mu, rho, *priors = parameter
        rows, columns = mu.shape if mu.dim() == 2 else (1, mu.numel())
        self._library = library()
        self.problem = Problem(rows=rows, columns=columns)
        self._kept: list[Tensor] = []
        self.read(mu=mu, rho=rho)
        if with_kl:
            prior_mu, prior_sigma = priors
            assert prior_mu is not None
            assert prior_sigma is not None
            self._read_priors(prior_mu, prior_sigma, mu.shape)
        if key is not None:
            seed, sample, address = key
            self._set_noise(int(seed), 0 if sample is None else int(sample), address)

    def _read_priors(self, prior_mu: Tensor, prior_sigma: Tensor, shape: torch.Size) -> None:
        self.problem.scalar_prior = prior_mu.dim() == prior_sigma.dim() == 0
        if self.problem.scalar_prior:
            self.read(prior_mu=prior_mu.float(), prior_sigma=prior_sigma.float())
        else:
            self.read(prior_mu=_widened(prior_mu).expand(shape), prior_sigma=_widened(prior_sigma).expand(shape))

    def _set_noise(self, seed: int, sample: int, address: Sequence[int]) -> None:
        stream, self.problem.row_offset, self.problem.column_offset = address
        self.problem.noise = Noise(seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, sample, stream)

    def read(self, **tensors: Tensor) -> None:
        """Sets the operands that are read, row-major as the C++ takes them."""
        self.write(**{name: tensor.contiguous() for name, tensor in tensors.items()})

    def write(self, **tensors: Tensor) -> None:
        """Sets the operands that are written."""
        for name, tensor in tensors.items():
            self._kept.append(tensor)
            setattr(self.problem, name, Operand(tensor.data_ptr(), TYPES[tensor.dtype]))

    def set_grad_kl(self, grad_kl: Tensor) -> None:
        self._kept.append(grad_kl.float())
        self.problem.grad_kl = self._kept[-1].data_ptr()

    def forward(self, output: Output) -> float:
        self.problem.output = output
        return self._library.forward(self.problem, torch.get_num_threads())

    def backward(self) -> None:
        self._library.backward(self.problem, torch.get_num_threads())


def _widened(tensor: Tensor) -> Tensor:
    return tensor if serves(tensor.dtype) else tensor.float()


def _forward(parameter: Parameter, key: Key | None, output: Output, dtype: torch.dtype, with_kl: bool) -> tuple[Tensor, float]:
    call = _Call(parameter, key, with_kl)
    result = parameter[0].new_empty(parameter[0].shape, dtype=dtype)
    call.write(weight=result)
    return result, call.forward(output)


def _kl(kl: float, mu: Tensor, with_kl: bool) -> Tensor:
    return mu.new_full((), kl, dtype=torch.float32) if with_kl else mu.new_empty(0, dtype=torch.float32)


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
    parameter, key = (mu, rho, prior_mu, prior_sigma), (seed, sample, address)
    weight, kl = _forward(parameter, key, Output.WEIGHT, dtype, with_kl)
    return weight, _kl(kl, mu, with_kl)


def weight_variance(
    mu: Tensor,
    rho: Tensor,
    prior_mu: Tensor | None,
    prior_sigma: Tensor | None,
    dtype: torch.dtype,
    with_kl: bool,
) -> tuple[Tensor, Tensor]:
    """sigma^2, of mu's shape in `dtype`, and the KL: what local reparameterisation multiplies x^2 with."""
    variance, kl = _forward((mu, rho, prior_mu, prior_sigma), None, Output.VARIANCE, dtype, with_kl)
    return variance, _kl(kl, mu, with_kl)


def normal(mu: Tensor, rho: Tensor, seed: Tensor, sample: Tensor | None, address: Sequence[int]) -> Tensor:
    """eps of mu's shape in float32: `fusedbayes.noise.normal` to 1e-5."""
    eps, _ = _forward((mu, rho, None, None), (seed, sample, address), Output.NORMAL, torch.float32, False)
    return eps


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
    key = None if seed is None else (seed, sample, address)
    grads = mu.new_empty(mu.shape), rho.new_empty(rho.shape)
    _backward(grad_weight, grad_kl, (mu, rho, prior_mu, prior_sigma), key, grads)
    return grads


def _backward(
    grad_weight: Tensor | None,
    grad_kl: Tensor | None,
    parameter: Parameter,
    key: Key | None,
    grads: tuple[Tensor, Tensor],
    weight: Tensor | None = None,
) -> None:
    """Writes dmu and drho, and into `weight` the weight again."""
    with_kl = grad_kl is not None and parameter[2] is not None
    call = _Call(parameter, key, with_kl)
    if grad_kl is not None and with_kl:
        call.set_grad_kl(grad_kl)
    if grad_weight is not None and key is not None:
        call.read(grad_weight=grad_weight)
    call.write(grad_mu=grads[0], grad_rho=grads[1])
    if weight is not None:
        call.write(weight=weight)
    call.backward()


def weight_kl(mu: Tensor, rho: Tensor, prior_mu: Tensor | None, prior_sigma: Tensor | None) -> Tensor:
    """The KL summed over the weights, in float32."""
    return _kl(_Call((mu, rho, prior_mu, prior_sigma), None, True).forward(Output.NONE), mu, True)


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
    """y = x W^T + b, and the KL of weight and bias."""
    parameter = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma)
    weight, kl = _forward(parameter, (seed, sample, weight_address), Output.WEIGHT, x.dtype, with_kl)
    bias = None
    if bias_mu is not None and bias_rho is not None:
        parameter = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
        bias, bias_kl = _forward(parameter, (seed, sample, bias_address), Output.WEIGHT, x.dtype, with_kl)
        kl += bias_kl
    return F.linear(x, weight, bias), _kl(kl, weight_mu, with_kl)


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
    parameter, key = (weight_mu, weight_rho, weight_prior_mu, weight_prior_sigma), (seed, sample, weight_address)
    if not needs_weight:
        weight, _ = _forward(parameter, key, Output.WEIGHT, grad_y.dtype, False)
        return grad_y @ weight, *(weight_mu.new_empty(0) for _ in range(4))
    grad_weight = grad_y.t() @ x
    # dmu takes the place of dY^T X: the C++ reads an element before it writes it.
    grad_mu = grad_weight if grad_weight.dtype == weight_mu.dtype else weight_mu.new_empty(weight_mu.shape)
    grads = grad_mu, weight_rho.new_empty(weight_rho.shape)
    drawn = grad_y.new_empty(weight_mu.shape) if needs_x else None
    _backward(grad_weight, grad_kl, parameter, key, grads, drawn)
    grad_x = grad_y.new_empty(0) if drawn is None else grad_y @ drawn
    if bias_mu is None or bias_rho is None:
        return grad_x, *grads, weight_mu.new_empty(0), weight_mu.new_empty(0)
    grad_bias = grad_y.sum(0, dtype=torch.float32)
    bias = (bias_mu, bias_rho, bias_prior_mu, bias_prior_sigma)
    return grad_x, *grads, *sample_weight_backward(grad_bias, grad_kl, *bias, seed, sample, bias_address)

"""The Bayesian counterparts of torch's convolutions, transposed ones among them."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedbayes import functional, noise, reference
from fusedbayes.nn.context import Draw
from fusedbayes.nn.module import BayesModule, product_dtype
from fusedbayes.noise import Role
from fusedbayes.reference import compute_dtype

Bias = Tensor | None


class _BayesConvolution(BayesModule):
    """What the convolutions share: the three estimators of a linear map whose weights are random.

    y = map(x; W) + b, by the library's convolution. "shared" draws W and b, with the KL, in one pass over the
    parameters. "local": y = map(x; mu) + b_mu + sqrt(map(x^2; sigma^2) + sigma_b^2) * zeta with a zeta for each element
    of the output (Kingma et al. 2015, equation 6): every output has its own distribution, but outputs of one example are
    drawn independently, though they share weights. "flipout": y = map(x; mu) + map(x * r; sigma eps) * s + b with
    random signs for each element of an example (Wen et al. 2018, equation 4).
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    spatial_dims: ClassVar[int]
    convolution: ClassVar[Callable[..., Tensor]]  # of torch.nn.functional

    @property
    def fan_in(self) -> int:
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def _map(self, x: Tensor, weight: Tensor, bias: Bias, output_size: list[int] | None = None) -> Tensor:
        """The convolution of the layer's arguments with these weights."""
        raise NotImplementedError

    def _forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        draw = self._draw(x)
        if draw is None:
            return self._map(x, self._tensor("weight_mu"), self._tensor("bias_mu"), output_size)
        draw = self._seeded(draw)
        if draw.num_samples == 1:
            return self._sample(x, draw, 0, output_size)
        batches = enumerate(x.chunk(draw.num_samples) if x.shape[0] else [x])
        return torch.cat([self._sample(batch, draw, index, output_size) for index, batch in batches])

    def _sample(self, x: Tensor, draw: Draw, index: int, output_size: list[int] | None) -> Tensor:
        """The output of one Monte Carlo sample."""
        if draw.estimator == "shared":
            drawn = self._sampled(draw, index)
            return self._map(x, drawn["weight"], drawn.get("bias"), output_size)
        if draw.estimator == "local":
            return self._local(x, draw, index, output_size)
        return self._flipout(x, draw, index, output_size)

    def _local(self, x: Tensor, draw: Draw, index: int, output_size: list[int] | None) -> Tensor:
        (mu, rho), (bias_mu, bias_rho) = self.posterior("weight"), self.posterior("bias")
        mean = self._map(x, mu, bias_mu, output_size)
        dtype = compute_dtype(mu)
        # Not in 16 bits, whatever autocast says: squares of float16 overflow and underflow.
        with reference.without_autocast(x):
            sigma_b = None if bias_rho is None else reference.sigma_from_rho(bias_rho.to(dtype))
            variance = self._map(
                x.to(dtype).square(),
                reference.sigma_from_rho(rho.to(dtype)).square(),
                None if sigma_b is None else sigma_b.square(),
                output_size,
            )
        zeta = noise.normal(*self._of_output(variance, draw, index, Role.LOCAL), dtype=dtype).view(variance.shape)
        return (mean.to(dtype) + reference.safe_sqrt(variance) * zeta).to(mean.dtype)

    def _flipout(self, x: Tensor, draw: Draw, index: int, output_size: list[int] | None) -> Tensor: ...


class BayesConv1d(_BayesConvolution):
    """Replaces `torch.nn.Conv1d`; arguments and shapes are its, and those of `BayesModule`."""

    replaces = nn.Conv1d

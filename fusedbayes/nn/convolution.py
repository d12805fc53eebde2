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

    _forward_of: ClassVar[Any]

    @property
    def fan_in(self) -> int:
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    def _map(self, x: Tensor, weight: Tensor, bias: Bias, *rest: Any) -> Tensor:
        raise NotImplementedError

    def _convolve(self, x: Tensor, *rest: Any) -> Tensor:
        draw = self._draw(x)
        if draw is None:
            return self._map(x, self._tensor("weight_mu"), self._tensor("bias_mu"), *rest)
        draw = self._seeded(draw)
        if draw.num_samples == 1:
            return self._sample(x, draw, 0, *rest)
        batches = x.chunk(draw.num_samples)
        return torch.cat([self._sample(batch, draw, index, *rest) for index, batch in enumerate(batches)])

    def _sample(self, x: Tensor, draw: Draw, index: int, *rest: Any) -> Tensor:
        if draw.estimator == "shared":
            drawn = self._sampled(draw, index)
            return self._map(x, drawn["weight"], drawn.get("bias"), *rest)
        return (self._local if draw.estimator == "local" else self._flipout)(x, draw, index, *rest)

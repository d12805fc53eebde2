"""The Bayesian counterparts of torch's convolutions, transposed ones among them."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedbayes import functional, reference
from fusedbayes.nn.context import Draw
from fusedbayes.nn.module import BayesModule, product_dtype
from fusedbayes.noise import Role

# Which weights, and bias or None, an input is convolved with.
Map = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _BayesConvolution(BayesModule):
    """What the convolutions share: the estimators of a linear map, by torch's convolution, whose weights are random.

    "shared" draws W and b, and gives their KL, in one pass over the parameters: y = map(x; W) + b.

    "local" draws each output from its own distribution, y = map(x; mu) + b_mu + sqrt(map(x^2; sigma^2) + sigma_b^2) *
    zeta (Kingma et al. 2015, equation 6), independently even of the outputs of the same example, which share weights.

    "flipout" gives each example its own perturbation of the weights, y = map(x; mu) + map(x * r; sigma eps) * s + b,
    with a random sign for each channel of an example, r for the inputs and s for the outputs (Wen et al. 2018, equation
    4): all positions of an example see one draw of the weights, as under "shared".
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def batched_dims(self) -> int:
        return len(self.kernel_size) + 2  # one less is an example without a batch

    @property
    def fan_in(self) -> int:
        return max(1, self.in_channels // self.groups * math.prod(self.kernel_size))

    def _estimate(self, x: Tensor, map_: Map) -> Tensor:
        """The output for a batch, or for one example, of whatever the layer draws."""
        draw = self._draw(x)
        if draw is None:
            return map_(x, self._tensor("weight_mu"), self._tensor("bias_mu"))
        draw = self._seeded(draw)
        if draw.estimator == "local":
            return self._local(x, map_, draw)
        batches = [x] if draw.num_samples == 1 or x.shape[0] == 0 else x.chunk(draw.num_samples)
        sample = self._shared if draw.estimator == "shared" else self._flipout
        outputs = [sample(batch, map_, draw, index) for index, batch in enumerate(batches)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _shared(self, x: Tensor, map_: Map, draw: Draw, index: int) -> Tensor:
        drawn = self._sampled(draw, index)
        return map_(x, drawn["weight"], drawn.get("bias"))

    def _local(self, x: Tensor, map_: Map, draw: Draw) -> Tensor:
        """Of all Monte Carlo samples at once, which differ in zeta alone."""
        (mu, rho), (bias_mu, bias_rho) = self.posterior("weight"), self.posterior("bias")
        mean = map_(x, mu, bias_mu)
        dtype = reference.compute_dtype(mu)
        # Not in 16 bits, whatever autocast says: squares of float16 overflow and underflow.
        with reference.without_autocast(x):
            variances = [None if r is None else reference.sigma_from_rho(r.to(dtype)).square() for r in (rho, bias_rho)]
            variance = map_(x.to(dtype).square(), *variances)
        batch = mean.shape[0] // draw.num_samples if x.dim() == self.batched_dims else 1
        columns = math.prod(mean.shape[1:] if x.dim() == self.batched_dims else mean.shape)
        zetas = [draw.normals(batch, columns, index, dtype, role=Role.LOCAL) for index in range(draw.num_samples)]
        zeta = (zetas[0] if len(zetas) == 1 else torch.cat(zetas)).view(mean.shape)
        return (mean.to(dtype) + reference.safe_sqrt(variance) * zeta).to(mean.dtype)

    def _flipout(self, x: Tensor, map_: Map, draw: Draw, index: int) -> Tensor:
        mu, rho = self.posterior("weight")
        bias = self._bias_of(draw, index)
        # sigma * eps as the draw of a mean of zero, without the cancellation of W - mu.
        zero = mu.new_zeros(()).expand(mu.shape)
        key: Any = {"seed": draw.seed, "sample": draw.sample_of(index)}
        perturbation, _ = functional.sample_weight(
            zero, rho, **key, address=draw.addresses["weight"], dtype=product_dtype(mu)
        )
        mean = map_(x, mu, bias)
        r = self._signs(x, draw, index, Role.FLIPOUT_INPUT)
        s = self._signs(mean, draw, index, Role.FLIPOUT_OUTPUT)
        return mean + map_(x * r, perturbation, None) * s

    def _bias_of(self, draw: Draw, index: int) -> Tensor | None:
        mu, rho = self.posterior("bias")
        if mu is None:
            return None
        key: Any = {"seed": draw.seed, "sample": draw.sample_of(index)}
        return functional.sample_weight(mu, rho, **key, address=draw.addresses["bias"], dtype=product_dtype(mu))[0]

    def _signs(self, like: Tensor, draw: Draw, index: int, role: int) -> Tensor:
        """A sign for each channel (column) of each example (row), to be multiplied with `like`."""
        batched = like.dim() == self.batched_dims
        rows, channels = like.shape[:2] if batched else (1, like.shape[0])
        signs = draw.signs(rows, channels, index, like.dtype, role=role)
        return signs.view(*like.shape[: 2 if batched else 1], *[1] * len(self.kernel_size))


class _BayesConv(_BayesConvolution):
    """The forward of a convolution: torch's, with other weights."""

    def forward(self, input: Tensor) -> Tensor:
        # torch's own method on our attributes, so that padding is what torch makes of it.
        forward: Any = self.replaces._conv_forward  # type: ignore[attr-defined]
        return self._estimate(input, lambda x, weight, bias: forward(self, x, weight, bias))


class _BayesConvTranspose(_BayesConvolution):
    """The forward of a transposed convolution: torch's, with other weights."""

    convolution: ClassVar[Callable[..., Tensor]]

    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    @property
    def fan_in(self) -> int:
        """Inputs that an output adds up at most: a stride keeps the taps of a kernel apart."""
        taps = [
            math.ceil(k / max(1, s // math.gcd(s, d)))  # torch takes a stride of 0 until it is called
            for k, s, d in zip(self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        return max(1, self.in_channels // self.groups * math.prod(taps))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        pad: Any = self.replaces._output_padding  # type: ignore[attr-defined]
        sizes = (self.stride, self.padding, self.kernel_size, dims, self.dilation)
        output_padding = pad(self, input, output_size, *sizes)
        how = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        transposed = type(self).convolution
        return self._estimate(input, lambda x, weight, bias: transposed(x, weight, bias, *how))


class BayesConv1d(_BayesConv):
    """Replaces `torch.nn.Conv1d`; arguments and shapes are its, and those of `BayesModule`."""

    replaces = nn.Conv1d


class BayesConv2d(_BayesConv):
    """Replaces `torch.nn.Conv2d`; arguments and shapes are its, and those of `BayesModule`."""

    replaces = nn.Conv2d


class BayesConv3d(_BayesConv):
    """Replaces `torch.nn.Conv3d`; arguments and shapes are its, and those of `BayesModule`."""

    replaces = nn.Conv3d


class BayesConvTranspose1d(_BayesConvTranspose):
    """Replaces `torch.nn.ConvTranspose1d`; arguments and shapes are its, and those of `BayesModule`."""

    replaces = nn.ConvTranspose1d
    convolution = staticmethod(F.conv_transpose1d)


class BayesConvTranspose2d(_BayesConvTranspose):
    """Replaces `torch.nn.ConvTranspose2d`; arguments and shapes are its, and those of `BayesModule`."""

    replaces = nn.ConvTranspose2d
    convolution = staticmethod(F.conv_transpose2d)


class BayesConvTranspose3d(_BayesConvTranspose):
    """Replaces `torch.nn.ConvTranspose3d`; arguments and shapes are its, and those of `BayesModule`."""

    replaces = nn.ConvTranspose3d
    convolution = staticmethod(F.conv_transpose3d)

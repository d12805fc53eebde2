"""The Bayesian counterparts of torch.nn.Linear, and of Hugging Face's Conv1D, which is one as well."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedbayes import functional
from fusedbayes.arguments import check_linear
from fusedbayes.checks import check_count
from fusedbayes.nn.module import BayesModule
from fusedbayes.priors import Prior
from fusedbayes.reference import Estimator


class _BayesLinearMap(BayesModule):
    """What layers that multiply their input with one matrix share: the forward, with all estimators."""

    def _oriented(self, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Tensors of the weight, or 0-d ones, as (out_features, in_features)."""
        return tensors

    def forward(self, input: Tensor) -> Tensor:
        draw = self._draw(input)
        held, bias = self.posterior("weight"), self.posterior("bias")
        weight = self._oriented(held)
        if draw is None:
            return F.linear(check_linear(input, *weight, *bias), weight[0], bias[0])
        same_input = False
        weight_prior = bias_prior = None
        if not self.prior_modules():
            # Also where no KL is wanted: a checkpoint saves the same tensors then.
            weight_prior = self._oriented(self.prior("weight"))
            bias_prior = None if bias[0] is None else self.prior("bias")
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and self._fold is not None:
            # With gradients a checkpoint would not find the repetition again.
            if (repeated := self._fold.repeated) is not None and repeated.is_(input):
                input, same_input = repeated.batch, True
        y, kl = functional.bayes_linear(
            input,
            *weight,
            *bias,
            weight_prior=weight_prior,
            bias_prior=bias_prior,
            with_kl=self._charges(),
            seed=draw.seed,
            sample=draw.sample,
            weight_address=draw.addresses["weight"],
            bias_address=draw.addresses["bias"],
            num_samples=draw.num_samples,
            same_input=same_input,
            estimator=draw.estimator,
        )
        if kl is not None:
            self._record_kl(kl, [*held, *(() if bias[0] is None else bias)])
        return y


class BayesLinear(_BayesLinearMap):
    """y = x W^T + b with W ~ N(weight_mu, softplus(weight_rho)^2), and likewise b: replaces `torch.nn.Linear`.

    Each forward draws its own weights, in training and in evaluation mode; the KL costs nothing unless it is asked for
    (`fusedbayes.kl_loss`, `fusedbayes.ELBO`). Source: Blundell et al., "Weight uncertainty in neural networks", ICML
    2015; docs/math.md.

    Args:
        in_features, out_features: sizes, 1 or more.
        bias: whether there is a bias, random like the weights (default True).
        prior_mu: mean of the prior of every weight and bias (default 0).
        prior_sigma: its standard deviation; None (default) means 1 / sqrt(in_features), so that the outputs of a layer
            keep their scale under the prior however wide it is.
        prior: in their place, a prior of any kind (`fusedbayes.priors`); weights and biases get a copy each (default
            None).
        sigma_init: initial standard deviation of the posterior; None (default) means 0.1 / sqrt(in_features), about a
            sixth of the spread of the initial means.
        estimator: how the output is sampled. "shared" (default): one draw of the weights for the whole batch. "local":
            each row's outputs from their own distribution, with less noise in the gradients. "flipout": one draw,
            decorrelated between the rows. See `fusedbayes.functional.bayes_linear` and docs/estimators.md. May be
            assigned later; parameters and state_dict do not depend on it.
        device, dtype: of the parameters.

    Attributes:
        weight_mu, weight_rho: (out_features, in_features) parameters.
        bias_mu, bias_rho: (out_features,) parameters, or None.
        weight_prior_mu, weight_prior_sigma, bias_prior_mu, bias_prior_sigma: buffers of a Normal prior, see
            `BayesModule`.

    Shape:
        (..., in_features) to (..., out_features), any leading dimensions.

    Raises:
        TypeError: a size is not an int, or a scale not a number.
        ValueError: a size, a standard deviation or the estimator is out of its range, or a prior is given twice.
    """

    replaces = nn.Linear

    in_features: int
    out_features: int
    weight_mu: nn.Parameter
    weight_rho: nn.Parameter
    bias_mu: nn.Parameter | None
    bias_rho: nn.Parameter | None
    weight_prior_mu: Tensor
    weight_prior_sigma: Tensor
    bias_prior_mu: Tensor | None
    bias_prior_sigma: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        prior_mu: float = 0.0,
        prior_sigma: float | None = None,
        prior: Prior | None = None,
        sigma_init: float | None = None,
        estimator: Estimator = "shared",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            check_count(in_features, "in_features"),
            check_count(out_features, "out_features"),
            bias,
            prior_mu=prior_mu,
            prior_sigma=prior_sigma,
            prior=prior,
            sigma_init=sigma_init,
            estimator=estimator,
            device=device,
            dtype=dtype,
        )

    @property
    def fan_in(self) -> int:
        return self.in_features


class _Conv1D:
    """Hugging Face's Conv1D, which whoever has such a layer has imported; importing it here would take seconds."""

    def __get__(self, instance: object, owner: type) -> Any:
        return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


class BayesTransposedLinear(_BayesLinearMap):
    """y = x W + b with a random W of shape (in_features, out_features): what GPT-2 is made of.

    Replaces ``transformers.pytorch_utils.Conv1D``, which is a linear layer and no convolution (that is `BayesConv1d`).
    Otherwise as `BayesLinear`, whose estimators, default scales and noise it has: W transposed is what a `BayesLinear`
    draws of it. So a `BayesLinear` or `BayesEmbedding` that holds the very same parameter shares its mean, sigma and
    prior, but not its draw, even within `frozen_sample`.

    Args:
        nf, nx: numbers of outputs and inputs, in this order.
        dtype, device and scales: as for `BayesLinear`.

    Attributes:
        weight_mu, weight_rho: (nx, nf) parameters.
        bias_mu, bias_rho: (nf,) parameters.

    Raises:
        RuntimeError: transformers is not imported; the layer goes back to a class of it.
        TypeError, ValueError: as `BayesLinear`.
    """

    replaces = _Conv1D()

    nf: int
    nx: int

    @classmethod
    def _blank(cls, nf: int, nx: int, dtype: torch.dtype | None = None) -> nn.Module:
        sizes = check_count(nf, "nf"), check_count(nx, "nx")
        with torch.device("meta"):
            return cls._imported()(*sizes).to(dtype or torch.get_default_dtype())

    @classmethod
    def _imported(cls) -> type[nn.Module]:
        if cls.replaces is None:
            raise RuntimeError(f"{cls.__name__} replaces transformers.pytorch_utils.Conv1D: import transformers first")
        return cls.replaces

    @property
    def fan_in(self) -> int:
        return self.nx

    def _draw_means(self) -> None:
        # As Conv1D's constructor does.
        nn.init.normal_(self._tensor("weight_mu"), std=0.02)
        nn.init.zeros_(self._tensor("bias_mu"))

    def deterministic(self) -> nn.Module:
        self._imported()
        return super().deterministic()

    def _oriented(self, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        first, second = (tensor.t() for tensor in tensors)
        return first, second

    def _arguments_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"

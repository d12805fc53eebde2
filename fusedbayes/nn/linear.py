"""The Bayesian counterpart of torch.nn.Linear."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedbayes import functional, reference
from fusedbayes.arguments import check_estimator, check_linear
from fusedbayes.checks import check_count, check_number, describe
from fusedbayes.nn.module import BayesModule, FrozenNoise, FusedKL, MeanWeights, check_fits
from fusedbayes.reference import Estimator


class BayesLinear(BayesModule):
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
        weight_prior_mu, weight_prior_sigma, bias_prior_mu, bias_prior_sigma: buffers, see `BayesModule`.

    Shape:
        (..., in_features) to (..., out_features), any leading dimensions.

    Raises:
        TypeError: a size is not an int, or a scale not a number.
        ValueError: a size, a standard deviation or the estimator is out of its range.
    """

    random_tensors = ("weight", "bias")

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
        sigma_init: float | None = None,
        estimator: Estimator = "shared",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {describe(dtype)}")
        self.in_features = check_count(in_features, "in_features")
        self.out_features = check_count(out_features, "out_features")
        self.prior_mu = check_number(prior_mu, "prior_mu")
        scale = 1.0 / math.sqrt(in_features)
        self.prior_sigma = check_number(scale if prior_sigma is None else prior_sigma, "prior_sigma", positive=True)
        self.sigma_init = check_number(0.1 * scale if sigma_init is None else sigma_init, "sigma_init", positive=True)
        self.estimator = estimator
        factory = {"device": device, "dtype": dtype}
        self._register_gaussian("weight", (out_features, in_features), factory)
        self._register_gaussian("bias", (out_features,) if bias else None, factory)
        self.reset_parameters()

    @property
    def estimator(self) -> Estimator:
        """How the output is sampled: "shared", "local" or "flipout"."""
        return self._estimator

    @estimator.setter
    def estimator(self, value: Estimator) -> None:
        check_estimator(value)
        self._estimator = value

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the means as torch.nn.Linear draws its weights, and sets sigma and the priors to the constructor's."""
        bound = 1.0 / math.sqrt(self.in_features)
        for name in self.names():
            parameter = self.gaussian(name)
            self._fill_prior(name, self.prior_mu, self.prior_sigma)
            check_fits(self.sigma_init, "sigma_init", parameter.rho.dtype, 0.0)
            nn.init.uniform_(parameter.mu, -bound, bound)
            sigma = torch.full((), self.sigma_init, dtype=torch.float32, device=parameter.rho.device)
            parameter.rho.copy_(reference.rho_from_sigma(sigma))

    def forward(self, input: Tensor) -> Tensor:
        noise = self._noises[-1] if self._noises else None
        weight, bias = self.posterior("weight"), self.posterior("bias")
        if isinstance(noise, MeanWeights):
            return F.linear(check_linear(input, *weight, *bias), weight[0], bias[0])
        where: dict[str, Any] = {"estimator": self._estimator, "num_samples": self._samples_in(input)}
        if isinstance(noise, FrozenNoise):
            where |= {"seed": noise.seed, "sample": noise.sample, "estimator": noise.estimator or self._estimator}
            where |= {f"{name}_address": address for name, address in noise.addresses.items()}
            if not noise.each_sample:
                where["num_samples"] = 1  # one function for all rows
        has_bias = bias[0] is not None
        with_kl = self._kl_wanted and self._kl_of_forward is None
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and self._fold is not None:
            # With gradients a checkpoint would not find the repetition again.
            if (repeated := self._fold.repeated) is not None and repeated.is_(input):
                input, where["same_input"] = repeated.batch, True
        y, kl = functional.bayes_linear(
            input,
            *weight,
            *bias,
            weight_prior=self.prior("weight"),
            bias_prior=self.prior("bias") if has_bias else None,
            with_kl=with_kl,
            **where,
        )
        if kl is not None:
            parameters = (*weight, *bias) if has_bias else weight
            vars(self)["_kl_of_forward"] = FusedKL(kl, parameters, tuple(p.requires_grad for p in parameters))
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_mu is not None}, "
            f"{self._prior_repr()}, estimator={self.estimator!r}"
        )

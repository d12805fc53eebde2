"""The Bayesian counterpart of torch.nn.Linear."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedbayes import functional
from fusedbayes.arguments import check_linear
from fusedbayes.checks import check_count
from fusedbayes.nn.module import BayesModule
from fusedbayes.priors import Prior
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

    def forward(self, input: Tensor) -> Tensor:
        draw = self._draw(input)
        weight, bias = self.posterior("weight"), self.posterior("bias")
        if draw is None:
            return F.linear(check_linear(input, *weight, *bias), weight[0], bias[0])
        same_input = False
        with_kl = self._charges()
        weight_prior = bias_prior = None
        if not self.prior_modules():
            # Also where no KL is wanted: a checkpoint saves the same tensors then.
            weight_prior, bias_prior = self.prior("weight"), None if bias[0] is None else self.prior("bias")
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
            with_kl=with_kl,
            seed=draw.seed,
            sample=draw.sample,
            weight_address=draw.addresses["weight"],
            bias_address=draw.addresses["bias"],
            num_samples=draw.num_samples,
            same_input=same_input,
            estimator=draw.estimator,
        )
        if kl is not None:
            self._record_kl(kl)
        return y

"""Who is measured: nn.Linear, plain PyTorch, the compiled clean layer, fusedbayes, and the libraries that are there.

Each is a layer class behind one interface; the same networks are built of all of them.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedbayes as fb
from fusedbayes import reference
from fusedbayes.noise import draw_seed
from fusedbayes.reference import ESTIMATORS, GaussianParameter

BASELINE = "nn.Linear"
OURS = "fusedbayes"
FAMILY = (OURS, f"{OURS}, local", f"{OURS}, flipout")  # by estimator
REFERENCE = "reference, eager"
PEERS = ("bayesian-torch", "torchbnn", "blitz-bayesian-pytorch")  # the libraries' packages
SIGMA_INIT = 0.1  # of the prior's sigma, 1 / sqrt(in_features), for every implementation


@dataclass(frozen=True)
class Implementation:
    """One way to have a Bayesian linear layer.

    Attributes:
        name: as the tables show it.
        make_layer: (in_features, out_features) to a layer.
        parameters: the layer's mu and what stands for sigma, for the weight and the bias.
        from_sigma: sigma to what stands for it.
        kl: KL of a whole model after a forward, as the library's users compute it; None for nn.Linear.
        kl_is_mean: the library averages the KL over each tensor instead of adding it up.
        kl_is_sampled: the library estimates the KL by the one sample that was drawn.
        compiled: torch.compile the network together with its KL.
        ours: the KL comes by `fusedbayes.ELBO`, samples by `fusedbayes.predict`.
    """

    name: str
    make_layer: Callable[[int, int], nn.Module]
    parameters: tuple[str, str, str, str] | None = None
    from_sigma: Callable[[Tensor], Tensor] = reference.rho_from_sigma
    kl: Callable[[nn.Module], Tensor] | None = None
    kl_is_mean: bool = False
    kl_is_sampled: bool = False
    compiled: bool = False
    ours: bool = False


LINEAR = Implementation(BASELINE, nn.Linear)


class CleanLinear(nn.Module):
    """What a careful user writes in six lines and hands to torch.compile: the real rival."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.prior_sigma = 1.0 / math.sqrt(in_features)
        self.weight_mu, self.weight_rho = (nn.Parameter(torch.zeros(out_features, in_features)) for _ in range(2))
        self.bias_mu, self.bias_rho = (nn.Parameter(torch.zeros(out_features)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weight_sigma, bias_sigma = F.softplus(self.weight_rho), F.softplus(self.bias_rho)
        weight = self.weight_mu + weight_sigma * torch.randn_like(weight_sigma)
        bias = self.bias_mu + bias_sigma * torch.randn_like(bias_sigma)
        return F.linear(x, weight, bias)

    def kl(self) -> Tensor:
        """Compiled together with the forward, it shares the softplus."""
        return self._kl(self.weight_mu, self.weight_rho) + self._kl(self.bias_mu, self.bias_rho)

    def _kl(self, mu: Tensor, rho: Tensor) -> Tensor:
        sigma, s0 = F.softplus(rho), self.prior_sigma
        return (math.log(s0) - sigma.log() + (sigma.square() + mu.square()) / (2 * s0**2) - 0.5).sum()


class ReferenceLinear(CleanLinear):
    """`fusedbayes.reference`, eager: the noise of the contract, kept for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.weight_mu, self.weight_rho, self.bias_mu, self.bias_rho
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return reference.bayes_linear(x, *parameters, draw_seed(x.device))

    def _kl(self, mu: Tensor, rho: Tensor) -> Tensor:
        prior = mu.new_zeros(()), mu.new_full((), self.prior_sigma)
        return reference.weight_kl(GaussianParameter(mu, rho, *prior))


def _sum_of_layers(model: nn.Module) -> Tensor:
    return torch.stack([module.kl() for module in model.modules() if isinstance(module, CleanLinear)]).sum()


MU_RHO = ("weight_mu", "weight_rho", "bias_mu", "bias_rho")


def implementations() -> dict[str, Implementation]:
    """Every implementation whose package can be imported, the baseline first and fusedbayes second."""
    found = [
        LINEAR,
        *(
            Implementation(name, partial(fb.BayesLinear, estimator=estimator), MU_RHO, kl=fb.kl_loss, ours=True)
            for name, estimator in zip(FAMILY, ESTIMATORS, strict=True)
        ),
        Implementation(REFERENCE, ReferenceLinear, MU_RHO, kl=_sum_of_layers),
        Implementation("clean layer, eager", CleanLinear, MU_RHO, kl=_sum_of_layers),
        Implementation("torch.compile", CleanLinear, MU_RHO, kl=_sum_of_layers, compiled=True),
        *(implementation for peer in (_bayesian_torch, _torchbnn, _blitz) for implementation in _if_installed(peer)),
    ]
    return {implementation.name: implementation for implementation in found}


def _if_installed(peer: Callable[[], list[Implementation]]) -> list[Implementation]:
    try:
        return peer()
    except ImportError:
        return []


def _bayesian_torch() -> list[Implementation]:
    layers = importlib.import_module("bayesian_torch.layers")
    get_kl_loss = importlib.import_module("bayesian_torch.models.dnn_to_bnn").get_kl_loss

    def make(kind: Any) -> Callable[[int, int], nn.Module]:
        def layer(in_features: int, out_features: int) -> nn.Module:
            # Called a variance, used as a standard deviation.
            made = kind(in_features, out_features, prior_variance=1.0 / math.sqrt(in_features))
            made.dnn_to_bnn_flag = True  # the forward returns a tensor, as in a converted network
            return made

        return layer

    names = ("mu_weight", "rho_weight", "mu_bias", "rho_bias")
    return [
        Implementation(f"bayesian-torch {short}", make(getattr(layers, name)), names, kl=get_kl_loss, kl_is_mean=True)
        for short, name in (("reparam", "LinearReparameterization"), ("flipout", "LinearFlipout"))
    ]


def _torchbnn() -> list[Implementation]:
    torchbnn = importlib.import_module("torchbnn")
    bayesian_kl_loss = importlib.import_module("torchbnn.functional").bayesian_kl_loss
    return [
        Implementation(
            "torchbnn",
            lambda k, n: torchbnn.BayesLinear(0.0, 1.0 / math.sqrt(k), k, n),
            ("weight_mu", "weight_log_sigma", "bias_mu", "bias_log_sigma"),
            from_sigma=torch.log,
            kl=lambda model: bayesian_kl_loss(model, reduction="sum")[0],
        )
    ]


def _blitz() -> list[Implementation]:
    modules = importlib.import_module("blitz.modules")
    base = importlib.import_module("blitz.modules.base_bayesian_module").BayesianModule

    def kl(model: nn.Module) -> Tensor:
        layers = [module for module in model.modules() if isinstance(module, base)]
        return sum(layer.log_variational_posterior - layer.log_prior for layer in layers)

    return [
        Implementation(
            "BLiTZ",
            lambda k, n: modules.BayesianLinear(k, n, prior_sigma_1=1.0 / math.sqrt(k), prior_pi=1.0),
            # The tensors that it samples from, of which the layer's own parameters are copies once it has moved.
            ("weight_sampler.mu", "weight_sampler.rho", "bias_sampler.mu", "bias_sampler.rho"),
            kl=kl,
            kl_is_sampled=True,
        )
    ]

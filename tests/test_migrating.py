"""What other libraries report as KL, in ours: the coefficients that docs/migrating.md gives."""

from collections.abc import Callable

import foreign
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

import fusedbayes as fb
from fusedbayes.nn import variational_parameters

NUM_DATA, BATCH = 50, 8
PRIOR = (0.0, 0.5)
SIZES = ((4, 6), (6, 3))
KINDS = {
    "bayesian-torch": "LinearReparameterization",
    "torchbnn": "BayesLinear",
    "blitz": "BayesianLinear",
    "torch-uncertainty": "BayesLinear",
}


def pair(library: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Two layers, theirs and ours, with the same posterior and prior."""
    theirs = nn.Sequential(*(foreign.layer(library, KINDS[library], *sizes, prior=PRIOR) for sizes in SIZES))
    ours = nn.Sequential(*(fb.BayesLinear(*sizes) for sizes in SIZES))
    fb.load_foreign(ours, theirs, library)
    return theirs, ours


def size(model: nn.Module) -> int:
    return sum(p.mu.numel() for p in variational_parameters(model))


def kl_term(model: nn.Module, kl_weight: float) -> Tensor:
    """What the KL adds to the loss of `fusedbayes.ELBO`."""
    out = fb.ELBO(model, F.cross_entropy, num_data=NUM_DATA, kl_weight=kl_weight)(
        torch.randn(BATCH, 4), torch.randint(0, 3, (BATCH,))
    )
    return kl_weight * out.kl / NUM_DATA


def mean_of(estimate: Callable[[], Tensor], draws: int = 500) -> tuple[Tensor, Tensor]:
    """Mean and its standard error."""
    with torch.no_grad():
        values = torch.stack([estimate() for _ in range(draws)]).double()
    return values.mean(), values.std() / draws**0.5


def log_q_and_p(layers: nn.Sequential) -> tuple[Tensor, Tensor]:
    """Log density of each weight that the samplers of BLiTZ and torch-uncertainty drew last, posterior and prior."""
    log_q, log_p = [], []
    for layer in layers:
        for sampler in (layer.weight_sampler, layer.bias_sampler):
            w = (sampler.w if hasattr(sampler, "w") else sampler.weight).double()
            log_q.append(Normal(sampler.mu.double(), sampler.sigma.double()).log_prob(w).flatten())
            log_p.append(Normal(*PRIOR).log_prob(w).flatten())
    return torch.cat(log_q), torch.cat(log_p)


def test_bayesian_torch_averages_over_each_tensor() -> None:
    theirs, ours = pair("bayesian-torch")
    reported = foreign.module("bayesian_torch.models.dnn_to_bnn").get_kl_loss(theirs)
    per_tensor = sum(p.layer.kl_of(p.name) / p.mu.numel() for p in variational_parameters(ours))
    torch.testing.assert_close(reported, per_tensor, rtol=1e-5, atol=0)
    # So a tensor has the coefficient num_data / (batch * size) of the bound, another for each size.
    for p in variational_parameters(ours):
        layer = theirs[int(p.layer_name)]
        mu, scale = (getattr(layer, f"{part}_{p.name}") for part in ("mu", "rho"))
        prior = (getattr(layer, f"prior_{p.name}_{part}") for part in ("mu", "sigma"))
        reported = layer.kl_div(mu, torch.log1p(torch.exp(scale)), *prior) / BATCH
        kl_weight = NUM_DATA / (BATCH * p.mu.numel())
        torch.testing.assert_close(reported, kl_weight * p.layer.kl_of(p.name) / NUM_DATA, rtol=1e-5, atol=0)


def test_bayesian_torch_counts_an_lstm_twice() -> None:
    theirs = foreign.layer("bayesian-torch", "LSTMReparameterization", 3, 4, prior=PRIOR)
    ours = fb.BayesLSTM(3, 4, batch_first=True)
    fb.load_foreign(ours, theirs, "bayesian-torch")
    reported = foreign.module("bayesian_torch.models.dnn_to_bnn").get_kl_loss(theirs)
    per_tensor = sum(p.layer.kl_of(p.name) / p.mu.numel() for p in variational_parameters(ours))
    torch.testing.assert_close(reported, 2 * per_tensor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_torchbnn(reduction: str) -> None:
    theirs, ours = pair("torchbnn")
    coefficient = 0.1
    reported = foreign.module("torchbnn").BKLLoss(reduction=reduction)(theirs)[0]
    kl_weight = coefficient * NUM_DATA / (size(ours) if reduction == "mean" else 1)
    torch.testing.assert_close(kl_term(ours, kl_weight), coefficient * reported, rtol=1e-5, atol=0)


def test_the_last_layer_only_of_torchbnn_is_its_bias() -> None:
    theirs, ours = pair("torchbnn")
    reported = foreign.module("torchbnn").BKLLoss(last_layer_only=True)(theirs)
    torch.testing.assert_close(reported, ours[1].kl_of("bias"), rtol=1e-5, atol=0)


def test_blitz() -> None:
    theirs, ours = pair("blitz")
    kl_of = foreign.module("blitz.losses").kl_divergence_from_nn
    x = torch.randn(BATCH, 4)

    def reported() -> Tensor:
        theirs(x)
        return kl_of(theirs)

    # One sample of log q - log(p + 1e-6).
    value = reported()
    log_q, log_p = log_q_and_p(theirs)
    torch.testing.assert_close(value.double(), (log_q - (log_p.exp() + 1e-6).log()).sum(), rtol=1e-5, atol=1e-5)
    mean, error = mean_of(reported)
    coefficient = 0.1
    assert abs(kl_term(ours, coefficient * NUM_DATA) - coefficient * mean) < coefficient * (5 * error + 1e-3)


def test_torch_uncertainty() -> None:
    theirs, ours = pair("torch-uncertainty")
    kl_of = foreign.torch_uncertainty("losses.bayesian").KLDiv(theirs)
    x = torch.randn(BATCH, 4)

    def reported() -> Tensor:
        theirs(x)
        return kl_of()[0]

    # One sample, half a nat too little for each weight, averaged over the layers.
    value = reported()
    log_q, log_p = log_q_and_p(theirs)
    torch.testing.assert_close(value.double(), (log_q - 0.5 - log_p).sum() / len(SIZES), rtol=1e-5, atol=1e-5)
    mean, error = mean_of(reported)
    coefficient = 0.1
    kl_weight = coefficient * NUM_DATA / len(SIZES)
    constant = 0.5 * size(ours) / len(SIZES)
    assert abs(kl_term(ours, kl_weight) - coefficient * (mean + constant)) < coefficient * (5 * error + 1e-3)

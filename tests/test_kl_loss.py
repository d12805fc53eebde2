"""`kl_loss`: every distinct Bayesian parameter once, as it is now."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fusedbayes import ELBO, BayesLinear, kl_loss

# Everything is float64: sums of some hundred terms of order 1, in another order than torch.distributions'.
EXACT = {"rtol": 1e-12, "atol": 0.0}


def layer(in_features: int, out_features: int, bias: bool = True) -> BayesLinear:
    made = BayesLinear(in_features, out_features, bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return made


def expected_kl(*tensors: tuple[BayesLinear, str]) -> Tensor:
    """The KL of the random tensors (layer, name), by torch.distributions."""
    total = torch.zeros((), dtype=torch.float64)
    for owner, name in tensors:
        mu, rho, prior_mu, prior_sigma = owner.gaussian(name)
        total = total + kl_divergence(Normal(mu, F.softplus(rho)), Normal(prior_mu, prior_sigma)).sum()
    return total


def both(*layers: BayesLinear) -> list[tuple[BayesLinear, str]]:
    return [(one, name) for one in layers for name in ("weight", "bias")]


def test_nested_shared_and_unused_layers_count_once() -> None:
    a, b, shared, unused = layer(3, 5), layer(5, 5, bias=False), layer(5, 5), layer(4, 2)
    model = nn.Sequential(a, nn.Sequential(nn.Linear(5, 5), nn.Sequential(b, shared)), shared)
    model.unused = unused
    model.again = nn.ModuleDict({"inner": model[1]})
    torch.testing.assert_close(kl_loss(model), expected_kl((b, "weight"), *both(a, shared, unused)), **EXACT)


@pytest.mark.parametrize("parts", [("mu", "rho"), ("mu",)], ids=["same_posterior", "same_mean_alone"])
def test_tied_parameters(parts: tuple[str, ...]) -> None:
    a, b = layer(5, 5), layer(5, 5)
    for part in parts:
        setattr(b, f"weight_{part}", getattr(a, f"weight_{part}"))
    # A mean with two sigmas makes two random tensors.
    charged = [*both(a), (b, "bias")] + ([] if "rho" in parts else [(b, "weight")])
    torch.testing.assert_close(kl_loss(nn.Sequential(a, b)), expected_kl(*charged), **EXACT)


def test_a_layer_by_itself_and_behind_a_wrapper() -> None:
    a = layer(3, 5)
    expected = expected_kl(*both(a))
    torch.testing.assert_close(kl_loss(a), expected, **EXACT)
    torch.testing.assert_close(a.kl_loss(), expected, **EXACT)
    torch.testing.assert_close(kl_loss(torch.compile(a, backend="eager")), expected, **EXACT)


def test_a_model_that_holds_itself() -> None:
    itself, a = nn.Module(), layer(3, 5)
    itself.module = itself
    assert kl_loss(itself) == 0
    itself.inner = a
    torch.testing.assert_close(kl_loss(itself), expected_kl(*both(a)), **EXACT)


def test_priors_of_its_own() -> None:
    a = layer(3, 5)
    a.set_prior(torch.randn(5, 3), torch.rand(5, 3) + 0.5)
    a.set_prior(0.3, 2.0, "bias")
    torch.testing.assert_close(kl_loss(a), expected_kl(*both(a)), **EXACT)


def test_forwards_do_not_matter() -> None:
    model = nn.Sequential(layer(3, 5), layer(5, 2))
    x = torch.randn(4, 3, dtype=torch.float64)
    before = kl_loss(model).item()
    model(x)
    model[1](model[0](model[0].weight_mu.new_ones(1, 3)))
    with torch.no_grad():
        model.eval()(x)
    assert kl_loss(model).item() == before


def test_never_stale() -> None:
    model = nn.Sequential(layer(3, 5), layer(5, 2))
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 2, (4,))
    elbo = ELBO(model, F.cross_entropy, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        expected = expected_kl(*both(*model))
        out = elbo(x, y)
        torch.testing.assert_close(out.kl, expected, **EXACT)
        torch.testing.assert_close(kl_loss(model), expected, **EXACT)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert expected_kl(*both(*model)) < expected


def test_never_detached() -> None:
    model = nn.Sequential(layer(3, 5), layer(5, 2))
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 2, (4,))
    with torch.no_grad():
        ELBO(model, F.cross_entropy, 10)(x, y)
    grads = torch.autograd.grad(kl_loss(model.eval()), list(model.parameters()))
    expected = torch.autograd.grad(expected_kl(*both(*model)), list(model.parameters()))
    # A rounding of the sums inside one gradient.
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("model", [nn.Linear(2, 3), nn.ReLU()], ids=["linear", "no_parameters"])
def test_zero_without_bayesian_layers(model: nn.Module) -> None:
    kl = kl_loss(model)
    assert kl.shape == ()
    assert kl.item() == 0.0

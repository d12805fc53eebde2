"""set_prior and set_sigma of numbers and tensors, and what they refuse; tests/test_priors_in_layers.py has priors."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import assert_same_state, snapshot
from torch.distributions import Normal, kl_divergence

from fusedbayes import BayesLinear


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("form", ["number", "scalar tensor", "per weight"])
def test_set_prior(name: str, form: str) -> None:
    layer = BayesLinear(5, 3, dtype=torch.float64)
    mu, rho, _, _ = layer.gaussian(name)
    other = layer.kl_of("bias" if name == "weight" else "weight")
    mean: Any = -0.25  # exact in every dtype
    sigma: Any = 1.75
    if form == "scalar tensor":
        mean, sigma = torch.tensor(mean), torch.tensor(sigma)
    elif form == "per weight":
        mean, sigma = torch.randn_like(mu, requires_grad=True), torch.rand_like(mu) + 0.1
    layer.set_prior(mean, sigma, name)
    mean, sigma = (torch.as_tensor(value).double() for value in (mean, sigma))
    expected = kl_divergence(Normal(mu, F.softplus(rho)), Normal(mean, sigma)).sum()
    torch.testing.assert_close(layer.kl_of(name), expected, rtol=1e-12, atol=0)
    assert torch.equal(layer.kl_of("bias" if name == "weight" else "weight"), other)
    assert layer.kl_loss().requires_grad
    assert not layer.gaussian(name).prior_mu.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 1.0, "weights"), ValueError, "name must be one of 'weight'.*got 'weights'"),
        ((0.0, 1.0, "bias"), ValueError, "name must be one of 'weight', got 'bias'"),
        ((0.0, 0.0), ValueError, "prior_sigma must be finite and positive, got 0"),
        ((0.0, -1.5), ValueError, "prior_sigma must be finite and positive, got -1.5"),
        ((math.nan, 1.0), ValueError, "prior_mu must be finite, got nan"),
        ((torch.tensor(math.inf), 1.0), ValueError, "prior_mu must be finite"),
        ((0.0, torch.eye(3, 5)), ValueError, "prior_sigma must be finite and positive"),
        ((0.0, torch.ones(5)), ValueError, r"prior_sigma must have shape \(\) or \(3, 5\), got \(5,\)"),
        ((torch.zeros(5, 3), 1.0), ValueError, r"prior_mu must have shape \(\) or \(3, 5\), got \(5, 3\)"),
        ((torch.zeros((), dtype=torch.long), 1.0), TypeError, "prior_mu must be .*int64"),
        (
            (0.0, torch.full((3, 5), 1e-50, dtype=torch.double)),
            ValueError,
            "prior_sigma must be finite and positive in .*float32",
        ),
        (("0", 1.0), TypeError, "prior_mu must be a number, got .*str"),
        ((0.0, None), TypeError, "prior_sigma must be a number, got NoneType"),
    ],
)
def test_set_prior_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    layer = BayesLinear(5, 3, bias=False)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        layer.set_prior(*arguments)
    assert_same_state(layer, before)


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3), torch.rand(3, 5) + 1e-4], ids=["number", "0-d", "each"])
def test_set_sigma(sigma: Any) -> None:
    layer = BayesLinear(5, 3)
    bias = layer.bias_rho.detach().clone()
    layer.set_sigma(sigma)
    # rho is rounded, and |rho| is below 10: so is log(sigma), by 10 eps.
    expected = torch.as_tensor(sigma).expand(3, 5)
    torch.testing.assert_close(torch.nn.functional.softplus(layer.weight_rho), expected, rtol=20 * 2.0**-24, atol=0)
    assert torch.equal(layer.bias_rho, bias)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0,), ValueError, r"sigma must be finite and positive, got 0\.0"),
        ((torch.zeros(3, 5),), ValueError, "sigma must be finite and positive in torch.float32, got tensor"),
        ((torch.ones(5),), ValueError, r"sigma must have shape \(\) or \(3, 5\), got \(5,\)"),
        ((torch.ones(3, 5, dtype=torch.long),), TypeError, "sigma must be a number or a floating-point tensor"),
        (("small",), TypeError, "sigma must be a number, got 'small'"),
        ((1e39,), ValueError, r"sigma must lie in .* torch.float32, got 1e\+39"),
        ((1.0, "gate"), ValueError, "name must be one of 'weight', 'bias', got 'gate'"),
    ],
)
def test_set_sigma_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    layer = BayesLinear(5, 3)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        layer.set_sigma(*arguments)
    assert_same_state(layer, before)

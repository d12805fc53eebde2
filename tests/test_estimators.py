"""The laws of the estimators, and many Monte Carlo samples in one batch. The moments of y are in test_linear.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedbayes as fb
from fusedbayes import BayesLinear, functional, noise, reference
from fusedbayes.kernels import streams
from fusedbayes.noise import Address, Role
from fusedbayes.reference import ESTIMATORS, Estimator

SAMPLED = pytest.mark.parametrize("estimator", ESTIMATORS)
EACH = {"samples_at_once": 1}


def layer_and_data(rows: int = 64, inputs: int = 20) -> tuple[BayesLinear, Tensor, Tensor]:
    """Linear regression with noise: what the figure in docs/estimators.md is of."""
    x = torch.randn(rows, inputs)
    layer = BayesLinear(inputs, 1, sigma_init=0.3)
    return layer, x, x @ torch.randn(inputs, 1) + 0.1 * torch.randn(rows, 1)


def gradients(layer: BayesLinear, x: Tensor, y: Tensor, draws: int) -> Tensor:
    """(draws, parameters): of half the mean squared error, a draw of the noise each."""
    rows = []
    for _ in range(draws):
        loss = 0.5 * (layer(x) - y).square().mean()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))]))
    return torch.stack(rows).double()


def expected_gradient(layer: BayesLinear, x: Tensor, y: Tensor) -> Tensor:
    """Of the expectation, half of the mean of (x mu^T + b - y)^2 + x^2 (sigma^2)^T + sigma_b^2."""
    mu, rho, bias_mu, bias_rho = leaves = [p.detach().double().requires_grad_() for p in layer.parameters()]
    error = x.double() @ mu.t() + bias_mu - y
    variance = x.double().square() @ F.softplus(rho).square().t() + F.softplus(bias_rho).square()
    return torch.cat([g.flatten() for g in torch.autograd.grad(0.5 * (error.square() + variance).mean(), leaves)])


@SAMPLED
def test_gradients_are_unbiased(estimator: Estimator) -> None:
    layer, x, y = layer_and_data()
    layer.estimator = estimator
    draws = gradients(layer, x, y, 400)
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected_gradient(layer, x, y)).abs() < 5.0 * standard_error).all()


def test_variance_of_the_gradients_is_smallest_for_local_and_largest_for_shared() -> None:
    """Shared noise does not average out over the batch: by the end local's variance is a fraction of it."""
    layer, x, y = layer_and_data()
    variances = {}
    for estimator in ESTIMATORS:
        layer.estimator = estimator
        variances[estimator] = gradients(layer, x, y, 200).var(0).sum().item()
    assert 1.5 * variances["local"] < variances["flipout"]
    assert 1.5 * variances["flipout"] < variances["shared"]


@SAMPLED
def test_an_estimator_is_assigned_to_a_living_layer(estimator: Estimator) -> None:
    layer, x, _ = layer_and_data()
    before = copy.deepcopy(layer.state_dict())
    layer(x)
    layer.estimator = estimator
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert f"estimator='{estimator}'" in repr(layer)
    assert copy.deepcopy(layer).estimator == estimator
    with fb.frozen_sample(layer, seed=2):
        assert torch.equal(layer(x), layer(x))
    with fb.mean_mode(layer):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight_mu, layer.bias_mu))


def test_an_unknown_estimator_is_refused() -> None:
    layer = BayesLinear(3, 2)
    message = "estimator must be one of 'shared', 'local', 'flipout', got 'reparam'"
    with pytest.raises(ValueError, match=message):
        layer.estimator = "reparam"
    assert layer.estimator == "shared"
    with pytest.raises(ValueError, match=message):
        functional.bayes_linear(torch.ones(2, 3), layer.weight_mu, layer.weight_rho, estimator="reparam")
    with pytest.raises(ValueError, match=message):
        fb.predict(layer, torch.ones(2, 3), estimator="reparam")


def test_the_noise_of_outputs_and_inputs_lies_where_it_is_said_to() -> None:
    """A shard of the outputs draws its part of the whole, signs and all."""
    x, mu, rho = torch.randn(3, 160), torch.randn(70, 160), torch.randn(70, 160) - 2
    for estimator in ESTIMATORS[1:]:
        whole, _ = functional.bayes_linear(x, mu, rho, seed=5, sample=3, estimator=estimator, weight_address=Address(8))
        part, _ = functional.bayes_linear(
            x, mu[33:], rho[33:], seed=5, sample=3, estimator=estimator, weight_address=Address(8, 33)
        )
        torch.testing.assert_close(part, whole[:, 33:], rtol=1e-5, atol=1e-5)  # products of other shapes
    zeta = noise.normal(5, 3, 70, sample=3, stream=8 + Role.LOCAL)
    std = (x.square() @ F.softplus(rho).square().t()).sqrt()
    y, _ = functional.bayes_linear(x, mu, rho, seed=5, sample=3, estimator="local", weight_address=Address(8))
    torch.testing.assert_close(y, x @ mu.t() + std * zeta, rtol=1e-5, atol=1e-4)


def test_signs() -> None:
    """Bit c % 32 of word (c // 32) % 4 at the counter c // 128; as many of each as fair coins give."""
    signs = noise.signs(7, 50, 300, sample=2, stream=11)
    row, column = 41, 233
    words = noise.philox_words(7, torch.tensor(column // 128), torch.tensor(row), 2, 11)
    bit = int(words[column // 32 % 4]) >> column % 32 & 1
    assert signs[row, column] == 1 - 2 * bit
    assert torch.equal(
        noise.signs(7, 20, 100, sample=2, stream=11, row_offset=30, column_offset=190), signs[30:, 190:290]
    )
    assert noise.signs(7, 0, 5).shape == (0, 5)
    assert signs.abs().eq(1).all()
    assert abs(signs.mean().item()) < 5 / signs.numel() ** 0.5
    assert abs((signs[:, 1:] * signs[:, :-1]).mean().item()) < 5 / signs.numel() ** 0.5


@SAMPLED
def test_compiled(estimator: Estimator) -> None:
    layer, x, y = layer_and_data()
    layer.estimator = estimator
    elbo = fb.ELBO(layer, F.mse_loss, 100, num_samples=2)
    results = []
    for run in (elbo, torch.compile(elbo, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        out = run(x, y)
        results.append([*out, *torch.autograd.grad(out.loss, list(layer.parameters()))])
    torch.testing.assert_close(*results)


@SAMPLED
def test_autocast(estimator: Estimator) -> None:
    layer, x, _ = layer_and_data()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = fb.predict(layer, x, 2, seed=3, estimator=estimator).outputs
    assert narrow.dtype == torch.bfloat16
    wide = fb.predict(layer, x, 2, seed=3, estimator=estimator).outputs
    # x and what is sampled are rounded to 2^-9, sums of 20 products; a square root halves that of a variance.
    scale = (x.abs() @ (layer.weight_mu.abs() + 7 * reference.sigma_from_rho(layer.weight_rho)).t()).detach()
    assert ((narrow - wide).abs() <= 2.0**-7 * (scale + wide.abs())).all()


def test_fp16_autocast_keeps_squares_in_range() -> None:
    layer, x = BayesLinear(5, 3, estimator="local"), 300 * torch.randn(4, 5)
    with fb.use_reference(), torch.autocast("cpu", torch.float16):
        y = layer(x)
        y.float().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_another_default_dtype() -> None:
    layer, x = BayesLinear(50, 30, estimator="local"), torch.randn(4, 50)
    expected = [fb.predict(layer, x, 2, seed=1, estimator=estimator).outputs for estimator in ESTIMATORS]
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = [fb.predict(layer, x, 2, seed=1, estimator=estimator).outputs for estimator in ESTIMATORS]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected)


def test_streams_of_the_kernels_are_those_of_the_contract() -> None:
    for name in ("LOCAL", "FLIPOUT_INPUT", "FLIPOUT_OUTPUT"):
        assert getattr(streams, name) == getattr(Role, name)

"""Mistakes that existing libraries make, one test each; every docstring says what goes wrong there."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fusedbayes import (
    ELBO,
    BayesLinear,
    BayesMultiheadAttention,
    frozen_sample,
    kl_loss,
    mean_mode,
    predict,
    to_bayesian,
)
from fusedbayes.reference import ESTIMATORS


def test_two_forwards_before_one_backward() -> None:
    """The second forward overwrites the noise that autograd kept of the first: drho is wrong, without an error."""
    layer = BayesLinear(5, 3, bias=False, dtype=torch.float64)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = torch.zeros_like(layer.weight_rho)
    loss = torch.zeros((), dtype=torch.float64)
    for sample in range(2):
        with frozen_sample(layer, 1, sample=sample):
            loss = loss + layer(x[sample]).sum()
            weight = layer(torch.eye(5, dtype=torch.float64)).t()
        # W = mu + softplus(rho) eps, and sum(x W^T) grows by sum(x) with every row of W.
        eps = (weight - layer.weight_mu) / F.softplus(layer.weight_rho)
        expected += (x[sample].sum(0) * eps * torch.sigmoid(layer.weight_rho)).detach()
    loss.backward()
    torch.testing.assert_close(layer.weight_rho.grad, expected, rtol=1e-10, atol=1e-10)


def test_kl_is_a_sum_over_weights() -> None:
    """The KL is averaged over each tensor, so that it hardly depends on the number of weights."""
    model = nn.Sequential(*(BayesLinear(n, m, prior_sigma=2.0, sigma_init=1.0) for n, m in ((7, 5), (5, 2))))
    for parameter in (model[0].weight_mu, model[0].bias_mu, model[1].weight_mu, model[1].bias_mu):
        nn.init.zeros_(parameter)
    weights = 7 * 5 + 5 + 5 * 2 + 2
    expected = torch.tensor(weights * (math.log(2.0) + 1.0 / 8.0 - 0.5))
    torch.testing.assert_close(kl_loss(model), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("arrangement", ["nested", "same layer twice", "same parameters in two layers"])
def test_kl_counts_each_parameter_once(arrangement: str) -> None:
    """A recursive sum meets nested layers once per level and shared layers once per use."""
    first, second = BayesLinear(4, 4), BayesLinear(4, 4)
    expected = first.kl_loss()
    if arrangement == "nested":
        model = nn.Sequential(nn.Sequential(nn.Sequential(first)), second)
        expected = expected + second.kl_loss()
    elif arrangement == "same layer twice":
        model = nn.Sequential(first, nn.ReLU(), nn.Sequential(first))
    else:
        for name, parameter in first.named_parameters():
            setattr(second, name, parameter)
        model = nn.Sequential(first, second)
    torch.testing.assert_close(kl_loss(model), expected, rtol=1e-6, atol=0)
    elbo = ELBO(model, F.mse_loss, 10)
    for _ in range(2):  # nor does it pile up from call to call
        kl = elbo(torch.ones(2, 4), torch.ones(2, 4)).kl
        torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)


def test_prior_survives_save_and_load() -> None:
    """The prior is not in the state_dict: after loading, the KL is taken from the default prior."""
    saved, loaded = BayesLinear(5, 3), BayesLinear(5, 3)
    saved.set_prior(0.3, torch.rand(3, 5) + 1.0)
    saved.set_prior(torch.randn(3), 2.0, "bias")
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(kl_loss(loaded), kl_loss(saved))
    assert (kl_loss(loaded) - kl_loss(BayesLinear(5, 3))).abs() > 1.0


@pytest.mark.parametrize("how", ["set_prior", "moped"])
def test_prior_does_not_move_with_the_mean(how: str) -> None:
    """The prior mean shares storage with mu, so that it follows every optimizer step and the KL stays near zero."""
    if how == "set_prior":
        layer = BayesLinear(5, 3, bias=False)
        layer.set_prior(layer.weight_mu, 0.5)
    else:
        layer = to_bayesian(nn.Linear(5, 3, bias=False), init="moped", prior_sigma=0.5)
    before = layer.kl_loss()
    with torch.no_grad():
        layer.weight_mu += 1.0
    # Each weight is now 1 = 2 prior sigmas from its prior mean: 2^2 / 2 nats more.
    torch.testing.assert_close(layer.kl_loss() - before, torch.tensor(5 * 3 * 2.0), rtol=1e-5, atol=0)


def test_sigma_is_a_standard_deviation() -> None:
    """An argument called variance is used as a standard deviation, or the other way round."""
    n = 20_000
    layer = BayesLinear(1, n, prior_sigma=0.5, sigma_init=0.5)
    for mean in (layer.weight_mu, layer.bias_mu):
        nn.init.zeros_(mean)
    biases = layer(torch.zeros(1, 1))
    # The standard error of a normal sample's standard deviation is sigma / sqrt(2 n).
    assert abs(biases.std().item() - 0.5) < 5 * 0.5 / math.sqrt(2 * n)
    # Posterior and prior coincide: 40,000 terms, each zero up to a few float32 roundings.
    assert layer.kl_loss().abs() < 2 * n * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("rho", "sigma"),
    [(-3e38, 2.0**-126), (-200.0, 2.0**-126), (-50.0, math.exp(-50.0)), (88.8, 88.8), (100.0, 100.0), (1e4, 1e4)],
)
def test_softplus_neither_overflows_nor_vanishes(rho: float, sigma: float) -> None:
    """log1p(exp(rho)) is infinite from 88.8 on, and so is the logarithm of a sigma that has underflowed."""
    layer = BayesLinear(5, 3, bias=False)
    nn.init.constant_(layer.weight_rho, rho)
    y, kl = layer(torch.ones(2, 5)), layer.kl_loss()
    (y.sum() + kl).backward()
    for value in (y, kl, layer.weight_mu.grad, layer.weight_rho.grad):
        assert value is not None
        assert value.isfinite().all()
    posterior = Normal(layer.weight_mu.double(), torch.tensor(sigma, dtype=torch.float64))
    expected = kl_divergence(posterior, Normal(0.0, layer.weight_prior_sigma.double())).sum()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zero_input_row(estimator: str) -> None:
    """The square root of a zero variance has an infinite gradient: one all-zero input row makes every gradient NaN."""
    layer = BayesLinear(5, 3, bias=False, estimator=estimator)
    x = torch.randn(4, 5)
    x[1] = 0.0
    x.requires_grad_()
    y = layer(x)
    assert y[1].eq(0.0).all()
    y.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, layer.weight_mu, layer.weight_rho))


def cuda(layer: nn.Module) -> nn.Module:
    return layer.cuda()


@pytest.mark.parametrize("move", [copy.deepcopy, nn.Module.double, pytest.param(cuda, marks=pytest.mark.gpu)])
def test_weights_are_not_stale_after_a_move(move: Callable[[nn.Module], nn.Module]) -> None:
    """Samples, KL or noise are kept in attributes that .cuda() and deepcopy leave behind or share."""
    layer = BayesLinear(5, 3)
    layer(torch.ones(2, 5)).sum().backward()
    kl_loss(layer)
    moved: Any = move(layer)
    x = torch.ones(2, 5).to(moved.weight_mu)
    with frozen_sample(moved, 1):
        before, kl_before = moved(x), kl_loss(moved)
        with torch.no_grad():
            moved.weight_mu += 1.0
        after, kl_after = moved(x), kl_loss(moved)
    # Five weights of every output grew by 1.
    torch.testing.assert_close(after - before, torch.full_like(before, 5.0), rtol=1e-5, atol=0)
    assert (kl_after - kl_before).abs() > 1.0
    moved.zero_grad()
    (after.sum() + kl_after).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moved.parameters())
    assert before.device == kl_before.device == moved.weight_mu.device


def test_output_is_a_tensor() -> None:
    """A layer returns (output, kl), so nn.Sequential hands a tuple to the next one."""
    model = nn.Sequential(BayesLinear(5, 4), nn.ReLU(), BayesLinear(4, 3))
    y = model(torch.ones(2, 5))
    assert isinstance(y, Tensor)
    assert y.shape == (2, 3)


def test_conversion_keeps_dtype_and_device() -> None:
    """The new layers are float32 on the CPU, whatever the old ones were."""
    model = to_bayesian(nn.ModuleList([nn.Linear(5, 4, dtype=torch.float64), nn.Linear(5, 4, device="meta")]))
    assert {tensor.dtype for tensor in model[0].state_dict().values()} == {torch.float64}
    assert all(tensor.is_meta for tensor in model[1].state_dict().values())


def test_conversion_leaves_convolutions_alone() -> None:
    """A convolution is rebuilt without its padding_mode and computes something else."""
    convolution = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(2 * 4 * 4, 3))
    image = torch.randn(2, 1, 4, 4)
    expected = model(image)
    to_bayesian(model)
    assert model[0] is convolution
    with mean_mode(model):
        assert torch.equal(model(image), expected)


def test_conversion_of_the_root_module() -> None:
    """Only children are replaced: a model that is itself a linear layer comes back as it was."""
    assert type(to_bayesian(nn.Linear(5, 3))) is BayesLinear


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_conversion_of_a_transformer(training: bool) -> None:
    """Attention is left out, or its output projection is replaced though it is never called, or torch's inference path
    crashes on layers without a weight or goes past them.
    """
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(3, 6, 8)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    expected = model(x, src_key_padding_mask=padding)
    attention = [layer.self_attn for layer in model.layers]
    means = [parameter for a in attention for parameter in a.parameters()]
    to_bayesian(model).train(training)
    assert [layer.self_attn for layer in model.layers] == attention
    assert {type(a) for a in attention} == {BayesMultiheadAttention}
    parameters = [p for a in attention for name, p in a.named_parameters() if name.endswith("_mu")]
    assert all(p is mean for p, mean in zip(parameters, means, strict=True))
    with torch.no_grad():
        with mean_mode(model):
            # The same operations on the same numbers, unless the padding takes another way.
            torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected, rtol=1e-5, atol=1e-5)
        samples = [model(x, src_key_padding_mask=padding) for _ in range(2)]
    assert all(sample.isfinite().all() for sample in samples)
    assert not torch.equal(*samples)


def test_samples_differ() -> None:
    """sample(n) expands one draw: n identical samples, and no uncertainty."""
    outputs = predict(BayesLinear(5, 3), torch.ones(2, 5), num_samples=50).outputs
    assert len(outputs.flatten(1).unique(dim=0)) == 50


@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_kl_of_bfloat16(how: str) -> None:
    """Summed in bfloat16 the KL stops growing once a weight's share is below half a unit of its eight bits."""
    layer = BayesLinear(300, 200, dtype=torch.bfloat16 if how == "parameters" else None)
    exact = copy.deepcopy(layer).double().kl_loss()
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            kl = kl_loss(layer)
    else:
        kl = kl_loss(layer)
    assert kl.dtype == torch.float32
    # About ten float32 roundings per weight and pairwise sums, on terms of which the largest is log(prior / sigma).
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=0)

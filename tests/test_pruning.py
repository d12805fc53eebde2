"""Pruning by signal-to-noise: what becomes of a pruned weight, and of the others."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import fusedbayes as fb
from fusedbayes.nn import variational_parameters
from fusedbayes.reference import ESTIMATORS, sigma_from_rho

LAYERS: Any = [
    (lambda: fb.BayesLinear(5, 3), (4, 5)),
    (lambda: fb.nn.BayesConv2d(2, 3, 2), (4, 2, 5, 5)),
    (lambda: fb.nn.BayesConvTranspose1d(2, 3, 2, stride=2), (4, 2, 5)),
]
layers = pytest.mark.parametrize(("make", "shape"), LAYERS, ids=["linear", "conv2d", "transposed1d"])


def mlp() -> nn.Sequential:
    """With signal-to-noise ratios around 1."""
    model = nn.Sequential(fb.BayesLinear(6, 8), nn.ReLU(), fb.BayesLinear(8, 3))
    with torch.no_grad():
        for p in variational_parameters(model):
            p.value.mu.normal_()
            p.value.rho.normal_()
    return model


def ratios(model: nn.Module, name: str = "weight") -> Tensor:
    """Of all tensors of this name."""
    values = [p.value for p in variational_parameters(model) if p.name == name]
    return torch.cat([(v.mu.abs() / sigma_from_rho(v.rho)).flatten() for v in values]).detach()


def kl_of_others(model: nn.Module) -> Tensor:
    """The KL of the weights that are not pruned, by torch.distributions."""
    total = torch.zeros(())
    for p in variational_parameters(model):
        mu, rho, prior_mu, prior_sigma = p.value
        pruned = p.layer.pruned(p.name)
        kl = kl_divergence(Normal(mu, sigma_from_rho(rho)), Normal(prior_mu, prior_sigma))
        total = total + (kl if pruned is None else kl[~pruned]).sum()
    return total


def test_prunes_what_is_below_the_ratio() -> None:
    model = mlp()
    expected = ratios(model) < 1.2
    biases = ratios(model, "bias")
    report = fb.prune(model, snr=1.2)
    pruned = torch.cat([model[i].weight_pruned.flatten() for i in (0, 2)])
    assert torch.equal(pruned, expected)
    assert [row.name for row in report] == ["0.weight", "2.weight"]
    assert [row.size for row in report] == [48, 24]
    assert sum(row.pruned for row in report) == expected.sum()
    assert all(row.threshold == 1.2 for row in report)
    assert torch.equal(ratios(model, "bias"), biases)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.9, 1.0])
def test_prunes_a_fraction_of_the_whole_model(fraction: float) -> None:
    model = mlp()
    before = ratios(model)
    report = fb.prune(model, fraction=fraction)
    count = sum(row.pruned for row in report)
    assert count == round(fraction * 72)
    # One threshold for the model, between the ratios of those that went and those that stayed.
    ordered = [0.0, *before.sort().values.tolist(), math.inf]
    assert ordered[count] < report[0].threshold <= ordered[count + 1] or count == 0
    fb.prune(model, fraction=fraction)
    assert sum(int(model[i].weight_pruned.sum()) for i in (0, 2)) == count


def test_pruned_weights_stay_so() -> None:
    model = mlp()
    fb.prune(model, fraction=0.5)
    first = model[0].weight_pruned.clone()
    fb.prune(model, fraction=0.8)
    assert bool((model[0].weight_pruned | ~first).all())
    assert sum(row.pruned for row in fb.prune(model, fraction=0.2)) == round(0.8 * 72)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@layers
def test_counts_for_nothing_in_a_draw(make: Any, shape: tuple[int, ...], estimator: str) -> None:
    layer = make()
    layer.estimator = estimator
    fb.prune(layer, fraction=1.0, biases=True)
    # Everything is pruned: 1e-18 times a normal, added up over at most 10 inputs.
    assert layer(torch.randn(shape)).abs().max() < 1e-15


@layers
def test_mean_mode_and_the_deterministic_layer_are_the_same(make: Any, shape: tuple[int, ...]) -> None:
    layer, x = make(), torch.randn(shape)
    fb.prune(layer, fraction=0.5)
    with fb.mean_mode(layer):
        mean = layer(x)
    pruned = layer.weight_pruned
    assert torch.equal(mean, fb.to_deterministic(layer)(x))
    assert (layer.weight[pruned] == 0).all()
    assert "weight_pruned" not in layer.state_dict()


@layers
def test_kl_goes_without_pruned_weights(make: Any, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(make())
    before = fb.kl_loss(model)
    fb.prune(model, fraction=0.5)
    kl = fb.kl_loss(model)
    assert kl < before
    torch.testing.assert_close(kl, kl_of_others(model), rtol=1e-5, atol=0)
    elbo = fb.ELBO(model, lambda output, _: output.square().mean(), num_data=10)
    torch.testing.assert_close(elbo(torch.randn(shape), None).kl, kl, rtol=1e-6, atol=0)
    report = fb.kl_report(model)
    assert math.isclose(sum(row.kl for row in report), kl.item(), rel_tol=1e-5)
    fb.prune(model, fraction=1.0, biases=True)
    assert fb.kl_loss(model) == 0.0


def test_kl_with_a_prior_for_each_weight() -> None:
    model = nn.Sequential(fb.BayesLinear(5, 3))
    model[0].set_prior(torch.randn(3, 5), torch.rand(3, 5) + 0.5)
    fb.prune(model, fraction=0.5)
    mu, rho, prior_mu, prior_sigma = model[0].gaussian("weight")
    kl = kl_divergence(Normal(mu, sigma_from_rho(rho)), Normal(prior_mu, prior_sigma))[~model[0].weight_pruned].sum()
    torch.testing.assert_close(model[0].kl_of("weight"), kl, rtol=1e-5, atol=0)


PRIORS: Any = [
    fb.priors.Laplace(0.1, 0.3),
    fb.priors.Laplace(torch.zeros(3, 5), torch.rand(3, 5) + 0.1),
    fb.priors.LearnedNormal(),
    fb.priors.ScaleMixture(),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("prior", PRIORS, ids=["laplace", "laplace-per-weight", "learned", "mixture"])
def test_kl_under_other_priors(prior: fb.priors.Prior, dtype: torch.dtype) -> None:
    layer = fb.BayesLinear(5, 3, bias=False, dtype=dtype)
    layer.set_prior(prior)
    layer.set_sigma(0.1)
    mask = torch.rand(3, 5) < 0.6
    whole = torch.stack([layer.kl_of("weight") for _ in range(100)]).mean()
    layer.set_pruned(mask)
    kls = torch.stack([layer.kl_of("weight") for _ in range(100)])
    kls[0].backward()
    for parameter in (layer.weight_mu, layer.weight_rho):
        assert (parameter.grad[mask] == 0).all()
        assert parameter.grad.isfinite().all()
    # By torch.distributions and many samples of the weights that are left.
    mu, rho = (t.detach().float()[~mask] for t in layer.posterior("weight"))
    q = Normal(mu, sigma_from_rho(rho))
    of_all = layer.prior_of("weight")
    w = torch.zeros(20000, 3, 5)
    w[:, ~mask] = q.rsample((20000,))
    expected = (q.log_prob(w[:, ~mask]) - of_all.log_prob(w)[:, ~mask]).sum(1)
    error = (expected.var() / 20000 + kls.var() / 100).sqrt()
    assert abs(kls.mean() - expected.mean()) < 5 * error + 1e-4
    assert kls.mean() < whole
    layer.set_pruned(torch.ones(3, 5, dtype=torch.bool))
    # Nothing but the rounding of 15 logarithms of 1e-18, and of the squares of normals.
    assert layer.kl_of("weight").abs() < 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
@layers
def test_training_goes_on_with_the_others(make: Any, shape: tuple[int, ...], estimator: str) -> None:
    model = nn.Sequential(make())
    model[0].estimator = estimator
    elbo = fb.ELBO(model, lambda output, _: (output - 1.0).square().mean(), num_data=10)
    # With momentum from before, and a decay of the parameters.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(shape)
    for step in range(4):
        if step == 2:
            fb.prune(model, fraction=0.5)
            others = model[0].weight_mu[~model[0].weight_pruned].clone()
        optimizer.zero_grad()
        elbo(x, None).loss.backward()
        optimizer.step()
    pruned = model[0].weight_pruned
    for parameter in (model[0].weight_mu, model[0].weight_rho):
        assert parameter.grad.isfinite().all()
        assert (parameter.grad[pruned] == 0).all()
        assert (parameter.grad[~pruned] != 0).any()
    assert not torch.equal(model[0].weight_mu[~pruned], others)
    assert (model[0].posterior("weight")[0][pruned] == 0).all()
    fb.to_deterministic(model)
    assert (model[0].weight[pruned] == 0).all()
    assert (model[0].weight[~pruned] != 0).all()


def test_printing_a_layer_leaves_a_backward_pass_alone() -> None:
    layer = fb.BayesLinear(5, 3)
    fb.prune(layer, fraction=0.5)
    y = layer(torch.randn(4, 5)).sum()
    repr(layer)
    y.backward()


def test_state_dict_round_trip() -> None:
    model, fresh = mlp(), mlp()
    unpruned = copy.deepcopy(model.state_dict())
    fb.prune(model, fraction=0.5)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    x = torch.randn(7, 6)
    with fb.frozen_sample(model, 3), fb.frozen_sample(fresh, 3):
        assert torch.equal(fresh(x), model(x))
    assert torch.equal(fb.kl_loss(fresh), fb.kl_loss(model))
    fresh.load_state_dict(unpruned)  # of which no weight was pruned
    assert fresh[0].pruned("weight") is None
    copied = copy.deepcopy(model)
    assert torch.equal(copied[2].weight_pruned, model[2].weight_pruned)


def test_tied_weights_are_pruned_together() -> None:
    model = nn.Sequential(fb.BayesLinear(5, 5), fb.BayesLinear(5, 5))
    model[1].weight_mu, model[1].weight_rho = model[0].weight_mu, model[0].weight_rho
    report = fb.prune(model, fraction=0.4)
    assert len(report) == 1
    assert report[0].pruned == 10
    assert torch.equal(model[0].weight_pruned, model[1].weight_pruned)


def test_biases_if_asked_for() -> None:
    model = mlp()
    report = fb.prune(model, fraction=0.5, biases=True)
    assert [row.name for row in report] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert sum(row.pruned for row in report) == round(0.5 * 83)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    fb.prune(model, fraction=0.5)
    assert sum(int(model[i].weight_pruned.sum()) for i in (0, 2)) in range(30, 37)  # few values: ties at the threshold
    assert model(torch.randn(4, 6, dtype=dtype)).isfinite().all()
    assert fb.kl_loss(model).isfinite()


def test_compiles_and_checkpoints() -> None:
    model = mlp()
    fb.prune(model, fraction=0.5)
    x = torch.randn(4, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with fb.frozen_sample(model, 3):
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
    elbo = fb.ELBO(model, lambda y, _: y.square().mean(), 10)
    kl = torch.compile(elbo, fullgraph=True, backend="aot_eager")(x, x).kl
    torch.testing.assert_close(kl, fb.kl_loss(model))
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    y.sum().backward()
    assert (model[0].weight_mu.grad[model[0].weight_pruned] == 0).all()


def test_predict_folds_a_pruned_model() -> None:
    model = mlp()
    fb.prune(model, fraction=0.5)
    x = torch.randn(4, 6)
    together = fb.predict(model, x, num_samples=3, seed=0).outputs
    one_by_one = fb.predict(model, x, num_samples=3, seed=0, samples_at_once=1).outputs
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)


def test_a_mask_of_ones_own_and_none() -> None:
    layer = fb.BayesLinear(5, 3)
    mask = torch.rand(3, 5) < 0.5
    rho = layer.weight_rho.clone()
    layer.set_pruned(mask)
    assert torch.equal(layer.pruned("weight"), mask)
    layer.set_pruned(None)
    assert "weight_pruned" not in layer.state_dict()
    assert torch.equal(layer.posterior("weight")[1], rho)
    layer.set_pruned(mask)
    layer.reset_parameters()
    assert layer.pruned("weight") is None


def test_errors_change_nothing() -> None:
    model = mlp()
    for arguments, error, message in [
        ({}, TypeError, "exactly one of snr and fraction, got neither"),
        ({"snr": 1.0, "fraction": 0.5}, TypeError, "got both"),
        ({"snr": -1.0}, ValueError, "snr must not be negative"),
        ({"snr": "high"}, TypeError, "snr must be a number"),
        ({"fraction": 1.5}, ValueError, r"fraction must lie in \[0, 1\], got 1.5"),
    ]:
        with pytest.raises(error, match=message):
            fb.prune(model, **arguments)
    assert model[0].pruned("weight") is None
    with pytest.raises(ValueError, match="no Bayesian weights to prune"):
        fb.prune(nn.Linear(2, 2), snr=1.0)
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        fb.prune(mlp().to("meta"), snr=1.0)
    with pytest.raises(ValueError, match=r"pruned must have shape \(8, 6\), got \(6, 8\)"):
        model[0].set_pruned(torch.zeros(6, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match="pruned must be a bool tensor"):
        model[0].set_pruned(torch.zeros(8, 6))
    with pytest.raises(ValueError, match="name must be one of 'weight', 'bias'"):
        model[0].set_pruned(torch.zeros(8, 6, dtype=torch.bool), "gate")

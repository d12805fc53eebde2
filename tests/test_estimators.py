"""The laws of the estimators, and many Monte Carlo samples in one batch. The moments of y are in test_linear.py."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedbayes as fb
from fusedbayes import BayesLinear, functional, noise, reference
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


def network(estimator: Estimator) -> nn.Sequential:
    return nn.Sequential(BayesLinear(5, 16, estimator=estimator), nn.ReLU(), BayesLinear(16, 3, estimator=estimator))


@pytest.mark.parametrize("reference_only", [False, True], ids=["kernel", "reference"])
@SAMPLED
def test_samples_of_one_batch_are_those_of_single_calls(estimator: Estimator, reference_only: bool) -> None:
    model, x = network(estimator), torch.randn(7, 5)
    with fb.use_reference() if reference_only else torch.no_grad():
        together = fb.predict(model, x, 6, seed=3).outputs
        four_at_once = fb.predict(model, x, 6, seed=3, samples_at_once=4).outputs
        for index in range(6):
            with fb.frozen_sample(model, 3, sample=index):
                alone = model(x).detach()
            # Products of more rows, which a library may add up in another order.
            torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(four_at_once[index], alone, rtol=1e-5, atol=1e-5)


def test_predict_with_another_estimator_than_the_layers() -> None:
    model, x = network("shared"), torch.randn(7, 5)
    local = fb.predict(model, x, 3, seed=3, estimator="local").outputs
    assert [layer.estimator for layer in model if isinstance(layer, BayesLinear)] == ["shared"] * 2
    assert torch.equal(local, fb.predict(network_with(model, "local"), x, 3, seed=3).outputs)
    assert not torch.equal(local, fb.predict(model, x, 3, seed=3).outputs)


def network_with(model: nn.Sequential, estimator: Estimator) -> nn.Sequential:
    changed = copy.deepcopy(model)
    for layer in changed:
        if isinstance(layer, BayesLinear):
            layer.estimator = estimator
    return changed


@SAMPLED
def test_an_input_that_samples_share(estimator: Estimator) -> None:
    """Equal to its repetition, and so are the gradients; a layer that gets the repetition itself makes use of it."""
    layer, x = BayesLinear(5, 3), torch.randn(7, 2, 5, requires_grad=True)
    cotangent, results = torch.randn(4 * 7, 2, 3), []
    for given, same in ((x, True), (x.repeat(4, 1, 1), False)):
        y, _ = functional.bayes_linear(
            given, *layer.parameters(), seed=3, num_samples=4, same_input=same, estimator=estimator
        )
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_an_input_that_is_written_to_is_no_repetition_any_more() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2.0)

    layer, x = BayesLinear(5, 3, estimator="local"), torch.randn(7, 5)
    actual = fb.predict(nn.Sequential(InPlace(), layer), x, 3, seed=1).outputs
    expected = fb.predict(nn.Sequential(nn.Identity(), layer), 2 * x, 3, seed=1).outputs
    torch.testing.assert_close(actual, expected)


def test_one_function_of_a_model_that_was_trained_otherwise() -> None:
    model, x = network("local"), torch.randn(7, 5)
    with fb.frozen_sample(model, 3, sample=2, estimator="shared"):
        one, alone = model(x), model(x[3:4])
    torch.testing.assert_close(one.detach(), fb.predict(model, x, 3, seed=3, estimator="shared").outputs[2])
    torch.testing.assert_close(one[3:4], alone)  # the same function wherever the row is
    with pytest.raises(ValueError, match="estimator must be one of"), fb.frozen_sample(model, 3, estimator="loco"):
        pass


def test_an_input_without_a_batch_is_run_sample_by_sample() -> None:
    layer, x = BayesLinear(5, 3), torch.randn(5)
    outputs = fb.predict(layer, x, 4, seed=1).outputs
    assert torch.equal(outputs, fb.predict(layer, x, 4, seed=1, samples_at_once=1).outputs)


@SAMPLED
def test_elbo_averages_samples_of_one_batch(estimator: Estimator) -> None:
    """Value and gradients of frozen samples are the mean of theirs one by one."""
    model, x, y = network(estimator), torch.randn(7, 5), torch.randint(3, (7,))
    parameters = list(model.parameters())
    with fb.frozen_sample(model, seed=4, sample=2):
        out = fb.ELBO(model, F.cross_entropy, 100, num_samples=3)(x, y)
        actual = torch.autograd.grad(out.nll, parameters)
    losses = []
    for sample in (2, 3, 4):
        with fb.frozen_sample(model, seed=4, sample=sample):
            losses.append(F.cross_entropy(model(x), y))
    expected = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    torch.testing.assert_close(out.nll, torch.stack(losses).mean())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)  # sums of 21 rows in another order


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@SAMPLED
def test_a_checkpoint_is_repeated_for_as_many_samples(estimator: Estimator, use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=use_reentrant)

    model, x, y = network(estimator), torch.randn(7, 5, requires_grad=True), torch.randint(3, (7,))
    results = []
    for each in (model, Checkpointed(model)):
        torch.manual_seed(5)
        out = fb.ELBO(each, F.cross_entropy, 100, num_samples=3)(x, y)
        fb.ELBO(each, F.cross_entropy, 100)(x, y)  # of one sample, meanwhile, and not differentiated
        model.zero_grad()
        out.loss.backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results)


class TwoInputs(nn.Module):
    """Takes a dict and returns one: what holds no batch goes through as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = BayesLinear(5, 3)

    def forward(self, x: dict[str, Any]) -> dict[str, Any]:
        return {"logits": self.layer(x["a"] + x["pair"][1]), "name": x["name"]}


def test_inputs_and_outputs_of_several_tensors() -> None:
    model, rows = TwoInputs(), torch.randn(2, 7, 5)
    x = {"a": rows[0], "pair": (rows[1], rows[1]), "name": "here"}

    def nll(output: dict[str, Any], y: Tensor) -> Tensor:
        assert output["name"] == "here"
        return F.cross_entropy(output["logits"], y)

    y = torch.randint(3, (7,))
    for options in ({}, EACH):
        assert fb.ELBO(model, nll, 100, num_samples=3, **options)(x, y).nll.isfinite()


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("module", "training", "message"),
    [
        (nn.BatchNorm1d(3), True, r"the BatchNorm1d '1' normalises with the statistics of its batch"),
        (nn.BatchNorm1d(3, track_running_stats=False), False, r"the BatchNorm1d '1' normalises"),
        (nn.LSTM(3, 2), False, r"the LSTM '1' has batch_first=False"),
        (nn.MultiheadAttention(3, 1), False, r"the MultiheadAttention '1' has batch_first=False"),
        (Mean(), False, r"output must have shape \(14, ...\), got \(1, 3\): pass samples_at_once=1"),
    ],
    ids=["batch-norm", "no-running-statistics", "time-first", "attention", "another"],
)
def test_a_model_that_mixes_the_batch_is_refused(module: nn.Module, training: bool, message: str) -> None:
    model, x = nn.Sequential(BayesLinear(5, 3), module).train(training), torch.randn(7, 5)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        fb.ELBO(model, lambda output, y: output.sum(), 100, num_samples=2)(x, x)
    if not isinstance(module, Mean):
        assert torch.equal(torch.get_rng_state(), before)
    if isinstance(module, nn.BatchNorm1d):
        assert fb.ELBO(model, lambda output, y: output.sum(), 100, num_samples=2, **EACH)(x, x).nll.isfinite()
    if not training:
        with pytest.raises(ValueError, match=message):
            fb.predict(model, x, 2)
    assert all(layer._fold is None for layer in model if isinstance(layer, BayesLinear))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((torch.ones(7, 5), torch.ones(3, 2)), r"batch as its first dimension, got \(7, 5\), \(3, 2\)"),
        (torch.tensor(1.0), r"batch as its first dimension, got \(\)"),
    ],
    ids=["sizes", "scalar"],
)
def test_an_input_that_cannot_be_folded_is_refused(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fb.predict(BayesLinear(5, 3), x, 2, samples_at_once=2)


def test_rows_that_samples_do_not_divide_are_refused() -> None:
    layer = BayesLinear(5, 3)
    with pytest.raises(ValueError, match=r"num_samples is 4, so the first dimension of x .*, got shape \(6, 5\)"):
        functional.bayes_linear(torch.ones(6, 5), layer.weight_mu, layer.weight_rho, num_samples=4)
    with pytest.raises(TypeError, match=r"num_samples must be an int, got 2\.0"):
        functional.bayes_linear(torch.ones(6, 5), layer.weight_mu, layer.weight_rho, num_samples=2.0)


def test_a_large_input_is_not_repeated_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, seen = network("shared"), torch.randn(7, 5), []
    model[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    monkeypatch.setattr("fusedbayes.folding.LARGEST_INPUT", 3 * x.numel())
    fb.predict(model, x, 8)
    assert seen == [21, 21, 14]


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

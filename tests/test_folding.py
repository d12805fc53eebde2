"""Many Monte Carlo samples in one batch: equal to single calls, and refused where a model mixes the batch."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedbayes as fb
from fusedbayes import BayesLinear, functional
from fusedbayes.noise import draw_seed
from fusedbayes.reference import ESTIMATORS, Estimator

SAMPLED = pytest.mark.parametrize("estimator", ESTIMATORS)
EACH = {"samples_at_once": 1}


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
    """Value and gradients are the mean of the samples' one by one."""
    layer, x, y = BayesLinear(5, 3, estimator=estimator), torch.randn(7, 5), torch.randint(3, (7,))
    parameters = list(layer.parameters())
    torch.manual_seed(4)
    out = fb.ELBO(layer, F.cross_entropy, 100, num_samples=3)(x, y)
    actual = torch.autograd.grad(out.nll, parameters)
    torch.manual_seed(4)
    seed = draw_seed()
    options = {"seed": seed, "estimator": estimator}
    losses = [F.cross_entropy(functional.bayes_linear(x, *parameters, sample=s, **options)[0], y) for s in range(3)]
    expected = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    torch.testing.assert_close(out.nll, torch.stack(losses).mean())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)  # sums of 21 rows in another order


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_a_frozen_model_is_one_function_for_all_samples(at_once: int | None) -> None:
    model, x, y = network("shared"), torch.randn(7, 5), torch.randint(3, (7,))
    with fb.frozen_sample(model, seed=4, sample=2):
        out = fb.ELBO(model, F.cross_entropy, 100, num_samples=4, samples_at_once=at_once)(x, y)
        torch.testing.assert_close(out.nll, F.cross_entropy(model(x), y))


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, use_reentrant: bool = False) -> None:
        super().__init__()
        self.body, self.use_reentrant = body, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@SAMPLED
def test_a_checkpoint_is_repeated_for_as_many_samples(estimator: Estimator, use_reentrant: bool) -> None:
    model, x, y = network(estimator), torch.randn(7, 5, requires_grad=True), torch.randint(3, (7,))
    results = []
    for each in (model, Checkpointed(model, use_reentrant)):
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


class OtherRows(nn.Module):
    """A layer whose input is not the batch."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode, self.layer = mode, BayesLinear(5, 5)
        self.queries = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "queries":
            return x @ self.layer(self.queries).t()
        if self.mode == "chunks":
            return torch.cat([self.layer(part) for part in x.chunk(2)])
        return self.layer(x[None].expand(8, *x.shape)).mean(0)


@pytest.mark.parametrize("mode", ["queries", "chunks", "time-first"])
def test_a_layer_that_gets_other_rows_is_refused(mode: str) -> None:
    model, x = OtherRows(mode), torch.randn(7, 5)
    with pytest.raises(
        ValueError, match=r"4 Monte Carlo samples of a batch of 7 .* no multiple of 28: pass samples_at"
    ):
        fb.predict(model, x, 4)
    assert fb.predict(model, x, 4, **EACH).outputs.isfinite().all()


@SAMPLED
def test_interleaved_checkpoints_of_equal_rows(estimator: Estimator) -> None:
    """Each backward pass repeats its own forward, whatever number of samples others had for as many rows."""
    model = network(estimator)
    run = Checkpointed(model)
    elbos = [
        (fb.ELBO(run, F.cross_entropy, 100, num_samples=s), torch.randn(b, 5), b) for s, b in ((4, 3), (2, 6), (1, 12))
    ]
    expected, losses = [], []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        for elbo, x, rows in elbos:
            elbo.model = run if checkpointed else model
            loss = elbo(x.requires_grad_(), torch.zeros(rows, dtype=torch.long)).loss
            if checkpointed:
                losses.append(loss)
            else:
                expected.append(torch.autograd.grad(loss, list(model.parameters())))
    for loss, gradients in zip(losses[::-1], expected[::-1], strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), gradients)


def test_checkpoints_of_equal_rows_in_one_backward_pass_are_refused() -> None:
    run, losses = Checkpointed(network("local")), []
    for samples, rows in ((2, 6), (4, 3)):
        x, y = torch.randn(rows, 5, requires_grad=True), torch.zeros(rows, dtype=torch.long)
        losses.append(fb.ELBO(run, F.cross_entropy, 100, num_samples=samples)(x, y).loss)
    with pytest.raises(RuntimeError, match="different numbers of Monte Carlo samples: pass samples_at_once=1"):
        sum(losses).backward()


def test_a_prediction_within_a_backward_pass() -> None:
    model, x, seen = network("shared"), torch.randn(7, 5), []
    leaf = torch.ones((), requires_grad=True)
    leaf.register_hook(lambda _: seen.append(fb.predict(model, x, 4, seed=1).outputs))
    (2 * leaf).backward()
    assert torch.equal(seen[0], fb.predict(model, x, 4, seed=1).outputs)


def test_only_a_prediction_makes_use_of_the_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, seen = BayesLinear(5, 3), torch.randn(7, 5), []
    call = functional.bayes_linear
    monkeypatch.setattr(
        functional, "bayes_linear", lambda *a, **k: seen.append(k.get("same_input", False)) or call(*a, **k)
    )
    fb.predict(layer, x, 4)
    fb.ELBO(layer, lambda output, y: output.square().sum(), 10, num_samples=4)(x, x)
    assert seen == [True, False]


def test_a_sample_beyond_the_last_is_refused() -> None:
    layer = BayesLinear(5, 3)
    with pytest.raises(ValueError, match=r"sample \+ num_samples must not exceed"):
        functional.bayes_linear(torch.ones(4, 5), layer.weight_mu, layer.weight_rho, sample=2**32 - 1, num_samples=2)


@SAMPLED
def test_outputs_may_be_written_to(estimator: Estimator) -> None:
    model, x = nn.Sequential(BayesLinear(5, 3, estimator=estimator), nn.ReLU(inplace=True)), torch.randn(7, 5)
    model(x).sum().backward()
    fb.ELBO(model, lambda output, y: output.sub_(y).square().mean(), 10, num_samples=3)(
        x, torch.ones(7, 3)
    ).loss.backward()


def test_transforms_of_an_objective_with_samples() -> None:
    elbo, x = fb.ELBO(network("local"), F.mse_loss, 10, num_samples=3), torch.randn(7, 5)
    y = torch.ones(7, 3)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return elbo(x, y).loss

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("outer_reentrant", [True, False])
@SAMPLED
def test_nested_checkpoints(estimator: Estimator, outer_reentrant: bool) -> None:
    model, x, y = network(estimator), torch.randn(7, 5, requires_grad=True), torch.randint(3, (7,))
    nested = Checkpointed(nn.Sequential(Checkpointed(model, True), nn.Identity()), outer_reentrant)
    results = []
    for each in (model, nested):
        torch.manual_seed(5)
        out = fb.ELBO(each, F.cross_entropy, 100, num_samples=3)(x, y)
        model.zero_grad()
        out.nll.backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results)
    assert all(layer._recalls == () for layer in model if isinstance(layer, BayesLinear))


def test_forwards_within_a_backward_pass_are_their_own() -> None:
    model, x, z = network("shared"), torch.randn(7, 5, requires_grad=True), torch.randn(5, 5)
    seen = []

    def hook(_: Tensor) -> None:
        with torch.no_grad(), fb.frozen_sample(model, 1):
            seen.append(model(z))
        seen.append(fb.predict(model, z, 2, seed=1, samples_at_once=1).outputs[0])

    x.register_hook(hook)
    fb.ELBO(model, lambda output, y: output.square().mean(), 10, num_samples=3)(x, x).loss.backward()
    assert torch.equal(seen[0], seen[1])


def test_an_output_that_cannot_be_taken_apart_is_refused() -> None:
    class Distribution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BayesLinear(5, 3)

        def forward(self, x: Tensor) -> torch.distributions.Normal:
            return torch.distributions.Normal(self.layer(x), 1.0)

    def nll(output: torch.distributions.Normal, y: Tensor) -> Tensor:
        return -output.log_prob(y).mean()

    model, x, y = Distribution(), torch.randn(7, 5), torch.zeros(7, 3)
    with pytest.raises(ValueError, match="the output holds a Normal, which cannot be taken apart"):
        fb.ELBO(model, nll, 10, num_samples=3)(x, y)
    assert fb.ELBO(model, nll, 10, num_samples=3, **EACH)(x, y).nll.isfinite()

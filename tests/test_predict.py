"""predict, and the summaries of its samples."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import draw, network
from scipy import special, stats
from torch import Tensor, nn

from fusedbayes import BayesLinear, Prediction, predict


def test_predict_is_a_frozen_sample_after_another() -> None:
    model = network().eval()
    x = torch.randn(4, 2, 5)
    prediction = predict(model, x, num_samples=6, seed=3)
    assert prediction.outputs.shape == (6, 4, 2, 3)
    assert not prediction.outputs.requires_grad
    singles = [draw(model, x, 3, sample) for sample in range(6)]
    assert torch.equal(prediction.outputs, torch.stack(singles))
    assert torch.equal(predict(model, x, num_samples=2, seed=3).outputs, prediction.outputs[:2])
    assert predict(model, x).outputs.shape[0] == 32
    assert predict(model, x, 2, class_dim=1).mutual_information.shape == (4, 3)


def test_predict_seeds() -> None:
    model = network()
    x = torch.randn(4, 5)
    runs = []
    for _ in range(2):
        torch.manual_seed(8)
        runs.append([predict(model, x, 2).outputs for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0], runs[0][1])
    generator = torch.get_rng_state()
    assert torch.equal(predict(model, x, 2, seed=5).outputs, predict(model, x, 2, seed=torch.tensor(5)).outputs)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_predict_leaves_training_modes_as_they_were(fails: bool) -> None:
    """Dropout is off meanwhile; modules that were in another mode than their parent go back into it."""
    model = network()
    model[0].eval()
    before = [m.training for m in model.modules()]
    during: list[bool] = []
    model[1].register_forward_hook(lambda module, *_: during.append(module.training))
    if fails:
        with pytest.raises(ValueError, match="x must have shape"):
            predict(model, torch.ones(2, 4))
    else:
        predict(model, torch.ones(2, 5), 3, samples_at_once=1)
        assert during == [False] * 3
    assert [m.training for m in model.modules()] == before
    x = torch.ones(2, 5)
    assert not torch.equal(model[0](x), model[0](x))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = BayesLinear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (network(), {"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        (network(), {"num_samples": 2.0}, TypeError, "num_samples must be an int, got .*float"),
        (network(), {"seed": 1.5}, TypeError, "seed must be an int.*got .*float"),
        (network(), {"seed": 2**64}, ValueError, f"seed must lie in .*got {2**64}"),
        (network(), {"seed": torch.tensor([1, 2])}, ValueError, r"seed must be a 0-d tensor, got shape \(2,\)"),
        (network(), {"seed": torch.tensor(1.0)}, TypeError, "seed must be an int or an int64 tensor.*float32"),
        (nn.Linear(5, 3), {}, ValueError, "model has no Bayesian layer"),
        (Pair(), {}, TypeError, "model must return a tensor, got tuple"),
        (abs, {}, TypeError, "model must be a .*Module, got builtin"),
    ],
    ids=["no samples", "float samples", "float seed", "huge seed", "seeds", "float tensor", "linear", "tuple", "abs"],
)
def test_predict_errors(model: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict(model, torch.ones(2, 5), **arguments)
    assert all(m.training for m in (model.modules() if isinstance(model, nn.Module) else ()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_classification_summaries(dtype: torch.dtype) -> None:
    logits = (3.0 * torch.randn(7, 4, 5, dtype=torch.float64)).to(dtype)
    probs = special.softmax(logits.double().numpy(), axis=-1)
    total, own = stats.entropy(probs.mean(0), axis=-1), stats.entropy(probs, axis=-1).mean(0)
    prediction = Prediction(logits)
    # Probabilities and entropies are of size 1 and computed in float32 or better: about ten roundings.
    atol = 10 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for actual, expected in (
        (prediction.mean_probs, probs.mean(0)),
        (prediction.predictive_entropy, total),
        (prediction.expected_entropy, own),
        (prediction.mutual_information, total - own),
    ):
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=0, atol=atol)
    assert (prediction.mutual_information > 0.0).all()


def test_mutual_information_at_its_ends() -> None:
    """Samples that agree share nothing with the class; certain samples that contradict each other share log 2."""
    agree = Prediction(torch.randn(1, 50, 5).expand(7, -1, -1))
    assert (agree.mutual_information >= 0.0).all()
    assert (agree.mutual_information < 1e-6).all()  # ten float32 roundings of entropies of size 1
    contradict = Prediction(torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]]))
    assert contradict.expected_entropy.item() == 0.0
    assert contradict.mutual_information.item() == pytest.approx(math.log(2.0), rel=1e-6)


@pytest.mark.parametrize("class_dim", [1, -3])
def test_classes_in_another_dimension(class_dim: int) -> None:
    logits = torch.randn(6, 2, 3, 4, 5)
    last = Prediction(logits.movedim(2, -1))
    moved = Prediction(logits, class_dim=class_dim)
    assert moved.mean_probs.shape == (2, 3, 4, 5)
    assert torch.equal(moved.mean_probs, last.mean_probs.movedim(-1, 1))
    for name in ("predictive_entropy", "expected_entropy", "mutual_information"):
        assert getattr(moved, name).shape == (2, 4, 5)
        assert torch.equal(getattr(moved, name), getattr(last, name))


@pytest.mark.parametrize(
    ("shape", "class_dim", "message"),
    [
        ((6, 4, 1), -1, "at least two logits"),
        ((6, 1, 4), 1, None),
        ((6, 4, 3), 2, r"class_dim is 2, .*\(4, 3\)"),
        ((6, 4, 3), -3, r"class_dim is -3, .*\(4, 3\)"),
        ((6, 4), -1, r"class_dim is -1, .*\(4,\)"),
    ],
)
def test_logits_that_are_not_classes(shape: tuple[int, ...], class_dim: int, message: str | None) -> None:
    prediction = Prediction(torch.randn(shape), class_dim)
    for name in ("mean_probs", "predictive_entropy", "expected_entropy", "mutual_information"):
        if message is None:
            getattr(prediction, name)
        else:
            with pytest.raises(ValueError, match=message):
                getattr(prediction, name)
    assert prediction.mean.shape == shape[1:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_regression_summaries(dtype: torch.dtype) -> None:
    outputs = (2.0 + torch.randn(9, 4, 3, dtype=torch.float64)).to(dtype)
    prediction = Prediction(outputs)
    values = outputs.double().numpy()
    spread = values.std(0, ddof=1)
    noise = np.array([0.1, 0.2, 3.0])
    atol = 20 * torch.finfo(prediction.mean.dtype).eps  # a few roundings of values of size 2 to 5
    for actual, expected in (
        (prediction.mean, values.mean(0)),
        (prediction.epistemic_std, spread),
        (prediction.std(0.0), spread),
        (prediction.std(0.7), np.sqrt(spread**2 + 0.49)),
        (prediction.std(torch.from_numpy(noise)), np.sqrt(spread**2 + noise**2)),
    ):
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=0, atol=atol)


def test_regression_errors() -> None:
    prediction = Prediction(torch.randn(3, 4, 1))
    with pytest.raises(ValueError, match=r"noise_sigma must not be negative, got -0\.5"):
        prediction.std(-0.5)
    with pytest.raises(TypeError, match=r"noise_sigma must be a number, got .*str"):
        prediction.std("0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_samples of at least 2, got 1"):
        _ = Prediction(torch.randn(1, 4, 1)).epistemic_std


def test_a_model_may_reuse_its_output() -> None:
    """Each sample is copied before the next one overwrites it."""

    class Reusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = BayesLinear(5, 3), torch.empty(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out.copy_(self.layer(x))

    outputs = predict(Reusing(), torch.randn(4, 5), num_samples=5, samples_at_once=1).outputs
    assert len(outputs.flatten(1).unique(dim=0)) == 5


@pytest.mark.parametrize("odd", [lambda y: y[:1], lambda y: y.double()], ids=["shape", "dtype"])
def test_an_output_that_depends_on_the_draw_is_refused(odd: Callable[[Tensor], Tensor]) -> None:
    class Fickle(BayesLinear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input) if self.calls == 1 else odd(super().forward(input))

    with pytest.raises(ValueError, match=r"one shape and dtype whatever the draw, got .* after"):
        predict(Fickle(5, 3), torch.randn(4, 5), num_samples=2, samples_at_once=1)

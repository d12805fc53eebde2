"""BayesLSTM, BayesGRU and BayesRNN: torch's own recurrence, one draw of the weights for a sequence."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fusedbayes as fb

LAYERS = [fb.BayesLSTM, fb.BayesGRU, fb.BayesRNN]
EACH = pytest.mark.parametrize("layer_class", LAYERS)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no_bias": {"num_layers": 2, "bias": False},
    "projected": {"proj_size": 2, "num_layers": 2, "bidirectional": True},
}
LENGTHS = torch.tensor([4, 6, 2])


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def make(layer_class: type, **arguments: Any) -> Any:
    return layer_class(5, 4, **arguments, dtype=torch.float64)


def sequences(layer: Any) -> Tensor:
    """Three sequences of six steps."""
    shape = (3, 6, 5) if layer.batch_first else (6, 3, 5)
    return torch.randn(shape, dtype=torch.float64)


def states(layer: Any, *batch: int) -> Any:
    """Initial states, for a batch or without one."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = (layer.proj_size or layer.hidden_size, layer.hidden_size)
    h, c = (torch.randn(rows, *batch, size, dtype=torch.float64) for size in sizes)
    return (h, c) if isinstance(layer, fb.BayesLSTM) else h


INPUTS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "batch": lambda layer: (sequences(layer),),
    "states": lambda layer: (sequences(layer), states(layer, 3)),
    "one": lambda layer: (torch.randn(6, 5, dtype=torch.float64),),
    "one_with_states": lambda layer: (torch.randn(6, 5, dtype=torch.float64), states(layer)),
    "packed": lambda layer: (pack_padded_sequence(sequences(layer), LENGTHS, layer.batch_first, False),),
    "packed_with_states": lambda layer: (*INPUTS["packed"](layer), states(layer, 3)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(
    ("layer_class", "arguments"),
    [(kind, name) for name in ARGUMENTS for kind in LAYERS if name != "projected" or kind is fb.BayesLSTM],
)
def test_whatever_torch_takes(layer_class: type, arguments: str, kind: str) -> None:
    """With the means what torch computes; with a draw the same shapes, and gradients for every mean and sigma."""
    layer = make(layer_class, **ARGUMENTS[arguments])
    inputs = INPUTS[kind](layer)
    expected = copy.deepcopy(layer).deterministic()(*inputs)
    with fb.mean_mode(layer):
        actual = layer(*inputs)
    assert_equal(actual, expected)
    drawn = layer(*inputs)
    assert type(drawn[0]) is type(inputs[0])
    drawn, expected = tree_leaves(drawn), tree_leaves(expected)
    assert [t.shape for t in drawn] == [t.shape for t in expected]
    assert not torch.equal(drawn[0], expected[0])
    drawn[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@EACH
def test_one_draw_for_a_sequence(layer_class: type) -> None:
    """Step by step under one function draw is the sequence at once: the weights do not change over time."""
    layer = make(layer_class, batch_first=True)
    x = sequences(layer)
    with fb.frozen_sample(layer, 3):
        expected, last = layer(x)
        hidden, steps = None, []
        for step in x.split(1, dim=1):
            output, hidden = layer(step, hidden)
            steps.append(output)
    # Products of other shapes, rounded at 1e-16, through six steps.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(torch.cat(steps, 1), expected, **close)
    torch.testing.assert_close(hidden, last, **close)
    assert not torch.equal(layer(x)[0], layer(x)[0])


class Tagger(nn.Module):
    """Outputs, and the last state with the batch first; starts from a state of its own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.start = fb.BayesLinear(5, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x[:, 0]).expand(self.layer.num_layers, -1, -1)
        output, last = self.layer(x, (h, h.tanh()) if isinstance(self.layer, fb.BayesLSTM) else h)
        h = last[0] if isinstance(last, tuple) else last
        return torch.cat([output, h.transpose(0, 1)], 1)


@EACH
def test_folded_samples_have_states_of_their_own(layer_class: type) -> None:
    """States have the batch as their second dimension, whatever batch_first says."""
    model = Tagger(make(layer_class, batch_first=True, num_layers=2))
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    together, one_by_one = (fb.predict(model, x, 4, seed=2, samples_at_once=n).outputs for n in (None, 1))
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)
    assert len(together.flatten(1).unique(dim=0)) == 4
    elbo = fb.ELBO(model, lambda y, _: y.square().mean(), 10, num_samples=3)
    elbo(x, None).loss.backward()
    assert all(p.grad is not None for p in model.layer.parameters())


@EACH
def test_what_cannot_be_folded(layer_class: type) -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make(layer_class, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed, _ = self.layer(pack_padded_sequence(x, LENGTHS.repeat(x.shape[0] // 3), True, False))
            return pad_packed_sequence(packed, True)[0]

    model, x = Packing(), torch.randn(3, 6, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got a PackedSequence.*samples_at_once=1"):
        fb.predict(model, x, 2)
    assert fb.predict(model, x, 2, samples_at_once=1).outputs.shape == (2, 3, 6, 4)
    with pytest.raises(ValueError, match=rf"the {layer_class.__name__} 'layer' has batch_first=False"):
        fb.predict(Tagger(make(layer_class)), x, 2)


@EACH
def test_other_estimators(layer_class: type) -> None:
    """They would draw anew at each time step: refused where the layer is asked, left out where a model is."""
    with pytest.raises(ValueError, match=r"estimator must be one of 'shared', got 'local'"):
        layer_class(5, 4, estimator="local")
    model = fb.to_bayesian(nn.ModuleList([layer_class.replaces(5, 4), nn.Linear(4, 3)]), estimator="flipout")
    assert [layer.estimator for layer in model] == ["shared", "flipout"]
    layer, outputs = make(layer_class), []
    x = sequences(layer)
    for estimator in ("local", "shared"):
        with fb.frozen_sample(layer, 1, estimator=estimator):
            outputs.append(layer(x)[0])
    assert_equal(*outputs)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.float().double(),
        lambda layer: layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True),
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
    ],
    ids=["to", "assign", "deepcopy", "pickle"],
)
@EACH
def test_no_stale_weights(layer_class: type, change: Callable[[Any], Any]) -> None:
    """torch's layers hold their weights in a second list: it is right after whatever happened in between."""
    model = nn.Sequential(layer_class.replaces(5, 4, dtype=torch.float64))
    attributes = set(vars(model[0]))
    fb.to_bayesian(model, sigma_init=1e-30)
    assert not any(
        isinstance(value, list) and value and isinstance(value[0], Tensor) for value in vars(model[0]).values()
    )
    changed = change(model[0])
    layer = changed if isinstance(changed, nn.Module) else model[0]
    with torch.no_grad():
        for mu in (layer.weight_hh_l0_mu, layer.bias_ih_l0_mu):
            mu.mul_(2.0)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    expected = layer(x)
    fresh = layer_class.replaces(5, 4, dtype=torch.float64)
    fresh.load_state_dict({name[:-3]: p for name, p in layer.named_parameters() if name.endswith("_mu")})
    assert_equal(expected, fresh(x))
    assert_equal(fb.to_deterministic(layer)(x), expected)
    assert set(vars(layer)) == attributes


def test_dropout_between_the_layers() -> None:
    layer = fb.BayesLSTM(5, 4, num_layers=2, dropout=0.5, sigma_init=1e-30)
    x = torch.randn(6, 3, 5)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_flatten_parameters_is_there() -> None:
    """Models call it before each forward."""
    layer = fb.BayesLSTM(5, 4)
    before = layer.state_dict()
    layer.flatten_parameters()
    assert_equal(layer.state_dict(), before)


def test_bad_input_is_refused_as_by_torch() -> None:
    layer = fb.BayesLSTM(5, 4)
    with pytest.raises(RuntimeError, match="Expected 5, got 4"):
        layer(torch.randn(6, 3, 4))
    with pytest.raises(ValueError, match="dtype"):
        layer(torch.randn(6, 3, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"hidden\[0\] size"):
        layer(torch.randn(6, 3, 5), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))


@pytest.mark.gpu
@EACH
def test_cuda_equals_cpu(layer_class: type) -> None:
    """And without cuDNN's warning that the weights are scattered."""
    layer = layer_class(5, 4, num_layers=2, bidirectional=True)
    x = torch.randn(6, 3, 5)
    twin = copy.deepcopy(layer).cuda()
    results = []
    for each in (layer, twin):
        with fb.frozen_sample(each, 1):
            output = each(x.to(each.weight_ih_l0_mu.device))[0]
        grads = torch.autograd.grad(output.square().sum(), list(each.parameters()))
        results.append([output.cpu(), *(grad.cpu() for grad in grads)])
    # eps agrees to 1e-5, sigma is 0.05; cuDNN may multiply in TF32, of 11 bits.
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)

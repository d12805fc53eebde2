"""BayesMultiheadAttention, and the transformers of torch that are made of it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedbayes as fb

Inputs = tuple[Tensor, Tensor, Tensor]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {"batch_first": True},
    "time_first": {},
    "no_bias": {"bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True},
    "other_sizes": {"kdim": 6, "vdim": 7, "batch_first": True},
}
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING, "average_attn_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "each_head": {"attn_mask": CAUSAL.expand(12, 5, 5)},
}


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def make(**arguments: Any) -> fb.BayesMultiheadAttention:
    layer = fb.BayesMultiheadAttention(8, 4, **arguments, dtype=torch.float64)
    with torch.no_grad():  # torch starts from biases of 0, which would hide a wrong one
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def inputs(kdim: int = 8, vdim: int = 8, batch_first: bool = False, **_: Any) -> Inputs:
    """Three sequences of five; query, key and value are one tensor if they may be."""
    query, key, value = (torch.randn(3, 5, size, dtype=torch.float64) for size in (8, kdim, vdim))
    if (kdim, vdim) == (8, 8):
        key = value = query = query if batch_first else query.transpose(0, 1)
    return query, key, value


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_whatever_torch_takes(arguments: str, call: str, training: bool) -> None:
    """With the means what torch computes, its inference path included; with a draw the same shapes, another output."""
    layer = make(**ARGUMENTS[arguments]).train(training)
    args, options = inputs(**ARGUMENTS[arguments]), CALLS[call]
    with torch.set_grad_enabled(training):
        expected = copy.deepcopy(layer).deterministic()(*args, **options)
        with fb.mean_mode(layer):
            assert_equal(layer(*args, **options), expected)
        output, weights = layer(*args, **options)
    assert (weights is None) == (expected[1] is None)
    assert output.shape == expected[0].shape
    assert weights is None or weights.shape == expected[1].shape
    assert not torch.equal(output, expected[0])


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_every_tensor_is_drawn_and_trained(arguments: str) -> None:
    layer = make(**ARGUMENTS[arguments])
    args = inputs(**ARGUMENTS[arguments])
    names = {name for name, _ in copy.deepcopy(layer).deterministic().named_parameters()}
    assert {row.name for row in fb.kl_report(layer)} == names
    # A bias of the keys adds the same to all scores of a query, and the softmax takes it out again.
    loss = layer(*args)[0].square().sum() + fb.kl_loss(layer)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_torchs_inference_path_takes_the_draw() -> None:
    """In evaluation without gradients torch computes past the functions of training: of the same weights."""
    layer, x = make(batch_first=True).eval(), inputs(batch_first=True)[0]
    with fb.frozen_sample(layer, 3):
        expected = layer(x, x, x, key_padding_mask=PADDING)
        with torch.no_grad():
            actual = layer(x, x, x, key_padding_mask=PADDING)
    # Sums of eight terms of size 1 in another order; rows without padding alone, the others are torch's to choose.
    torch.testing.assert_close([t[0] for t in actual], [t[0] for t in expected], rtol=1e-10, atol=1e-10)


class Masked(nn.Module):
    """Attention to padded sequences, from queries that are another tensor if asked."""

    def __init__(self, attention: nn.Module, cross: bool) -> None:
        super().__init__()
        self.attention = attention
        self.cross = cross

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        padding = PADDING.repeat(x.shape[0] // 3, 1)
        heads = CAUSAL.expand(4 * x.shape[0], 5, 5) if self.cross else CAUSAL
        query = x.flip(1) if self.cross else x
        return self.attention(query, x, x, key_padding_mask=padding, attn_mask=heads)


@pytest.mark.parametrize("cross", [True, False], ids=["cross", "self"])
def test_folded_samples_are_those_of_single_calls(cross: bool) -> None:
    layer = make(batch_first=True)
    x = inputs(batch_first=True)[0]
    for part in range(2):
        model = nn.Sequential(Masked(layer, cross), _Part(part)).eval()
        together, one_by_one = (fb.predict(model, x, 4, seed=2, samples_at_once=n).outputs for n in (None, 1))
        torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)
        assert len(together.flatten(1).unique(dim=0)) == 4


class _Part(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return x[self.index]


def test_what_cannot_be_folded() -> None:
    model = nn.Sequential(Masked(make(), False), _Part(0))
    with pytest.raises(ValueError, match=r"BayesMultiheadAttention '0\.attention' has batch_first=False"):
        fb.predict(model, inputs(batch_first=True)[0], 2)


def test_other_estimators() -> None:
    with pytest.raises(ValueError, match=r"estimator must be one of 'shared', got 'flipout'"):
        fb.BayesMultiheadAttention(8, 2, estimator="flipout")
    model = fb.to_bayesian(nn.TransformerEncoderLayer(8, 2, 12), estimator="local")
    estimators = [model.self_attn.estimator, model.self_attn.out_proj.estimator, model.linear1.estimator]
    assert estimators == ["shared", "shared", "local"]


def test_the_output_projection_goes_with_its_attention() -> None:
    attention = nn.MultiheadAttention(8, 2)
    before = dict(attention.named_parameters())
    with pytest.raises(ValueError, match=r"where='out_proj' picks no layer"):
        fb.to_bayesian(attention, where="out_proj")
    model, report = fb.to_bayesian(nn.Sequential(attention, nn.Linear(8, 8)), where="1", return_report=True)
    assert report[0].outcome == "left alone: not picked"
    assert report[1].outcome == "left alone: becomes Bayesian with the MultiheadAttention"
    _, report = fb.to_bayesian(model, where="0", init="moped", return_report=True)
    outcomes = [(row.name, row.outcome) for row in report]
    assert outcomes == [("0", "BayesMultiheadAttention"), ("0.out_proj", "BayesOutputProjection")]
    assert isinstance(attention.out_proj, fb.BayesLinear)
    assert torch.equal(attention.out_proj.weight_prior_mu, before["out_proj.weight"])
    fb.to_deterministic(model)
    assert type(attention) is nn.MultiheadAttention
    assert type(attention.out_proj) is type(nn.MultiheadAttention(8, 2).out_proj)
    assert all(p is before[name] for name, p in attention.named_parameters())


def test_an_attention_with_another_projection_is_left_alone() -> None:
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = nn.Linear(8, 8)
    _, report = fb.to_bayesian(nn.Sequential(attention, nn.Linear(8, 8)), return_report=True)
    assert "must have a NonDynamicallyQuantizableLinear as 'out_proj', got a Linear" in report[0].outcome
    assert type(attention) is nn.MultiheadAttention


TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "encoder": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2), 1),
    "decoder": lambda: (nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 1), 2),
    "transformer": lambda: (nn.Transformer(8, 2, 1, 1, 12, batch_first=True, norm_first=True), 2),
    "time_first": lambda: (nn.Transformer(8, 2, 1, 1, 12), 2),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_train(name: str, training: bool) -> None:
    """With sigma towards 0 the original, and a step of the ELBO reaches every mean and sigma."""
    model, num_inputs = TRANSFORMERS[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            vars(module).update({"p": 0.0, "dropout": 0.0} if isinstance(module, nn.MultiheadAttention) else {"p": 0.0})
    model.train(training)
    x = torch.randn(3, 3, 8)
    with torch.set_grad_enabled(training):
        expected = model(*[x] * num_inputs)
    original = [type(module) for module in model.modules()]
    fb.to_bayesian(model, sigma_init=1e-30)
    with torch.set_grad_enabled(training):
        # torch's inference path rounds in another order: normalised sums of at most twelve terms.
        torch.testing.assert_close(model(*[x] * num_inputs), expected, rtol=1e-5, atol=1e-5)

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(*[x] * num_inputs)

    out = fb.ELBO(Called(), lambda y, target: (y - target).square().mean(), 10)(x, torch.randn(3, 3, 8))
    torch.testing.assert_close(out.kl, fb.kl_loss(model), rtol=1e-6, atol=0)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    fb.to_deterministic(model)
    assert [type(module) for module in model.modules()] == original


def test_a_layer_of_which_a_part_is_converted() -> None:
    """torch's inference path reads all weights of the layer; it finds that one is random and calls the layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    for part in ("linear1", "self_attn"):
        with torch.no_grad():
            expected = layer(x)
            fb.to_bayesian(layer, where=part, sigma_init=1e-30)
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
            fb.to_deterministic(layer)
            fb.to_bayesian(layer, where=part)
            assert not torch.equal(layer(x), layer(x))
            fb.to_deterministic(layer)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_compiled_transformer() -> None:
    """In evaluation, where torch asks for each weight before it decides against its inference path."""
    model = fb.to_bayesian(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)).eval()
    x = torch.randn(3, 5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), fb.frozen_sample(model, 4):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)

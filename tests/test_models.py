"""Hugging Face's models, built small from their configurations with random weights: converted, trained and back."""

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedbayes as fb

TEXT = {"vocab_size": 23, "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 16}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 16, "hidden_size": 8, "intermediate_size": 12}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tokens(*names: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randint(3, 23, (3, 6)) for name in names}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 32, 32)}


# By the name of the model's class: its configuration, what makes a batch, and what stays deterministic.
MODELS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]], set[str]]] = {
    # The head holds the bias of its output layer once more.
    "BertForMaskedLM": (TEXT | LAYERS, tokens("input_ids"), {"LayerNorm", "BertLMPredictionHead"}),
    "GPT2LMHeadModel": (
        {"vocab_size": 23, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1}
        | {"eos_token_id": 2},
        tokens("input_ids"),
        {"LayerNorm"},
    ),
    "LlamaForCausalLM": (TEXT | LAYERS | {"num_key_value_heads": 1}, tokens("input_ids"), {"LlamaRMSNorm"}),
    "ViTForImageClassification": (IMAGE | LAYERS, image, {"LayerNorm", "ViTEmbeddings"}),
    "ResNetForImageClassification": (
        {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
        image,
        {"BatchNorm2d"},
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2},
        image,
        {"LayerNorm", "ConvNextLayerNorm", "ConvNextLayer"},
    ),
    "T5ForConditionalGeneration": (
        {"vocab_size": 23, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2},
        tokens("input_ids", "decoder_input_ids"),
        {"T5LayerNorm"},
    ),
    "CLIPModel": (
        {"text_config": TEXT | LAYERS | TOKENS, "vision_config": IMAGE | LAYERS, "projection_dim": 8},
        lambda: tokens("input_ids")() | image(),
        {"LayerNorm", "CLIPVisionEmbeddings", "CLIPModel"},
    ),
    "WhisperForConditionalGeneration": (
        {"vocab_size": 23, "num_mel_bins": 4, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
        | {"max_source_positions": 8, "max_target_positions": 8, **TOKENS},
        lambda: {"input_features": torch.randn(3, 4, 16)} | tokens("decoder_input_ids")(),
        {"LayerNorm", "WhisperPositionalEmbedding"},
    ),
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    # The folder kernels/ of this checkout is not Hugging Face's package of that name.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield pytest.importorskip("transformers")
    finally:
        del sys.modules["kernels"]


class Logits(nn.Module):
    """Takes a batch as one dict, and gives a tensor: what `predict` wants, and samples folded into a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        output = self.model(**batch)
        return output.logits_per_image if "logits_per_image" in output else output.logits


def make(transformers: Any, name: str) -> tuple[Logits, dict[str, Tensor]]:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**MODELS[name][0]))
    return Logits(model).eval(), MODELS[name][1]()


@EACH_MODEL
def test_sigma_towards_zero_is_the_original(transformers: Any, name: str) -> None:
    """Models that ask for a weight's dtype (ViT, T5, CLIP) among them; what has no counterpart is named."""
    model, batch = make(transformers, name)
    expected = model(batch)
    _, report = fb.to_bayesian(model, sigma_init=1e-30, return_report=True)
    # Products may be summed in another order.
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-6)
    assert {row.module for row in report if row.outcome.startswith("left alone")} == MODELS[name][2]


@EACH_MODEL
def test_trains_is_saved_and_goes_back(transformers: Any, name: str) -> None:
    model, batch = make(transformers, name)
    before = {key: id(parameter) for key, parameter in model.named_parameters(remove_duplicate=False)}
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    fb.to_bayesian(model)
    elbo = fb.ELBO(model, lambda logits, _: logits.square().mean(), num_data=10)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        out = elbo(batch, None)
        torch.testing.assert_close(out.kl, fb.kl_loss(model), rtol=1e-5, atol=0)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = fb.to_bayesian(make(transformers, name)[0])
    loaded.load_state_dict(torch.load(file))
    with fb.frozen_sample(model, 1), fb.frozen_sample(loaded, 1):
        assert torch.equal(loaded(batch), model(batch))

    with fb.mean_mode(model):
        expected = model(batch)
    fb.to_deterministic(model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert {key: id(parameter) for key, parameter in model.named_parameters(remove_duplicate=False)} == before
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("BertForMaskedLM", "bert.embeddings.word_embeddings"),
        ("GPT2LMHeadModel", "transformer.wte"),
        ("T5ForConditionalGeneration", "shared"),
        ("WhisperForConditionalGeneration", "model.decoder.embed_tokens"),
    ],
)
def test_tied_embeddings(transformers: Any, name: str, table: str) -> None:
    """The table of words is the output layer's weight: one mu and rho, one charge, one draw of a function."""
    model = make(transformers, name)[0].model
    embedding, output = model.get_submodule(table), model.get_output_embeddings()
    assert embedding.weight is output.weight
    fb.to_bayesian(model)
    assert (type(embedding), type(output)) == (fb.BayesEmbedding, fb.BayesLinear)
    assert embedding.weight_mu is output.weight_mu
    assert embedding.weight_rho is output.weight_rho
    weights = sum(rho.numel() for key, rho in model.named_parameters() if key.endswith("_rho"))
    assert sum(row.size for row in fb.kl_report(model)) == weights
    with fb.frozen_sample(model, 1):
        rows = output(torch.eye(8)) - output(torch.zeros(8))
        # Two backends of the noise may differ by 1e-5, sigma is at most 0.1.
        torch.testing.assert_close(embedding(torch.arange(3, 23)), rows.t()[3:], rtol=1e-5, atol=1e-5)
    fb.to_deterministic(model)
    assert embedding.weight is output.weight


def test_elbo_of_a_batch_that_is_a_dict(transformers: Any) -> None:
    """nll gets what the model returns, an output object of Hugging Face's too; several samples are one batch."""

    class WithDict(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: dict[str, Tensor]) -> Any:
            return self.model(**batch)

    def nll(output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output.logits.flatten(0, 1), target.flatten())

    model, batch = make(transformers, "BertForMaskedLM")
    fb.to_bayesian(model)
    values = []
    for at_once in (None, 1):
        elbo = fb.ELBO(WithDict(model.model), nll, 10, num_samples=3, samples_at_once=at_once)
        with fb.frozen_sample(model, 5):
            values.append(elbo(batch, batch["input_ids"]).nll)
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    together, one_by_one = (fb.predict(model, batch, 3, seed=1, samples_at_once=n).outputs for n in (None, 1))
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)


def test_generation_by_one_function(transformers: Any) -> None:
    """Under a frozen sample what is generated repeats, and keys and values that are kept are those of its weights."""
    model, batch = make(transformers, "GPT2LMHeadModel")
    fb.to_bayesian(model, sigma_init=0.3)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with fb.frozen_sample(model, 3):
        kept, anew = (model.model.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    assert kept.shape == (3, 11)
    assert torch.equal(kept, anew)


def test_conv1d(transformers: Any) -> None:
    """y = x W + b, in all three estimators, and back to a class that is looked up, never imported."""
    conv1d = transformers.pytorch_utils.Conv1D
    layer = fb.BayesTransposedLinear(6, 5, sigma_init=0.2, dtype=torch.float64)
    assert layer.weight_mu.shape == (5, 6)
    assert repr(layer).startswith("BayesTransposedLinear(nf=6, nx=5, prior_mu=0")
    linear = fb.BayesLinear(5, 6, sigma_init=0.2, dtype=torch.float64)
    linear.load_state_dict({key: value.t() for key, value in layer.state_dict().items()})
    for kind in (layer, linear):  # a prior for each weight
        shape = kind.weight_mu.shape
        mean = torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5)
        kind.set_prior(mean if shape == (6, 5) else mean.t(), 0.7)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    for estimator in layer.estimators:
        results = []
        for model in (layer, linear):
            model.estimator = estimator
            with fb.frozen_sample(model, 2):
                y, kl = model(x), fb.kl_loss(model)
            mu, rho = torch.autograd.grad(y.square().sum() + kl, [model.weight_mu, model.weight_rho])
            results.append((y, kl, mu, rho) if model is linear else (y, kl, mu.t(), rho.t()))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert type(fb.to_deterministic(layer)) is conv1d
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight.t(), layer.bias))


def test_conv1d_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils", raising=False)
    with pytest.raises(RuntimeError, match=r"BayesTransposedLinear replaces .*Conv1D: import transformers first"):
        fb.BayesTransposedLinear(6, 5)
    assert isinstance(fb.to_bayesian(nn.Linear(5, 3)), fb.BayesLinear)

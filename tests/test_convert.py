"""to_bayesian and to_deterministic: what they replace and what they keep."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedbayes import BayesLinear, frozen_sample, kl_loss, mean_mode, predict, to_bayesian, to_deterministic


def nested() -> nn.Sequential:
    head = nn.ModuleDict({"norm": nn.LayerNorm(4), "out": nn.Linear(4, 3, bias=False)})
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Sequential(head)))


def assert_same_tensors(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_replaces_every_linear_at_any_depth() -> None:
    model = nested()
    means = {name: p for name, p in model.named_parameters() if not name.endswith(("norm.weight", "norm.bias"))}
    assert to_bayesian(model) is model
    assert [type(m) for m in (model[0], model[2][0], model[2][1][0]["out"])] == [BayesLinear] * 3
    # The same Parameter objects, by the old names: an optimizer that holds them still does.
    parameters = dict(model.named_parameters())
    assert all(parameters[f"{name}_mu"] is p for name, p in means.items())
    assert model[2][1][0]["out"].bias_mu is None
    assert type(model[2][1][0]["norm"]) is nn.LayerNorm


def test_scales_are_those_of_the_constructor() -> None:
    model = to_bayesian(nn.Sequential(nn.Linear(16, 3)), prior_mu=0.25, prior_sigma=2.0, sigma_init=0.5)
    assert (model[0].weight_prior_mu.item(), model[0].bias_prior_sigma.item()) == (0.25, 2.0)
    # rho and softplus each round a few times in float32.
    torch.testing.assert_close(F.softplus(model[0].weight_rho), torch.full((3, 16), 0.5), rtol=1e-6, atol=0)
    default = to_bayesian(nn.Linear(16, 3))
    assert default.weight_prior_sigma.item() == 0.25
    torch.testing.assert_close(F.softplus(default.bias_rho), torch.full((3,), 0.025), rtol=1e-6, atol=0)


def test_sigma_towards_zero_is_the_original() -> None:
    model = nested()
    x = torch.randn(6, 5)
    hidden = model[2][0](F.relu(model[0](x)))
    to_bayesian(model, sigma_init=1e-30)
    assert torch.equal(model[2][0](F.relu(model[0](x))), hidden)


@pytest.mark.parametrize("root", [False, True], ids=["nested", "root"])
def test_exact_round_trip(root: bool) -> None:
    model: Any = nn.Linear(5, 4) if root else nested()
    first = model if root else model[0]
    first.eval().note = "kept"
    before, training, text = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], str(model)
    parameters = list(model.parameters())
    model = to_bayesian(model)
    first = model if root else model[0]
    assert isinstance(first, BayesLinear)
    assert first.note == "kept"
    assert not first.training
    model = to_deterministic(model)
    first = model if root else model[0]
    assert type(first) is nn.Linear
    assert first.note == "kept"
    assert_same_tensors(model, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [m.training for m in model.modules()] == training
    assert str(model) == text


def test_children_of_a_linear_are_kept() -> None:
    """Such as the observers that torch.ao.quantization hangs below a layer, for its hooks to call."""
    linear = nn.Linear(5, 4)
    linear.add_module("observer", nn.Identity())
    observer = linear.observer
    layer = to_bayesian(linear)
    assert layer.observer is observer
    assert to_deterministic(layer).observer is observer


def test_means_that_were_trained_go_back() -> None:
    model = to_bayesian(nested())
    torch.optim.SGD(model.parameters(), lr=0.1).step(lambda: (model[0](torch.ones(2, 5)).sum().backward(), 0.0)[1])
    weight, x = model[0].weight_mu.clone(), torch.randn(3, 5)
    with mean_mode(model):
        expected = model[0](x)
    to_deterministic(model)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[0](x), expected)


def test_shared_module_stays_shared() -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": linear, "second": nn.Sequential(linear)})
    to_bayesian(model)
    assert isinstance(model["first"], BayesLinear)
    assert model["first"] is model["second"][0]
    to_deterministic(model)
    assert model["first"] is model["second"][0]


def test_shared_weight_stays_shared() -> None:
    """Two Linears with one weight: one sigma, one prior, one charge, one draw of a function."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    to_bayesian(model, prior_sigma=0.5)
    assert model[0].weight_mu is model[1].weight_mu
    assert model[0].weight_rho is model[1].weight_rho
    expected = model[0].kl_loss() + model[1].kl_of("bias")
    torch.testing.assert_close(kl_loss(model), expected, rtol=1e-6, atol=0)
    x = torch.eye(4)
    with frozen_sample(model, 1):
        torch.testing.assert_close(model[0](x), model[1](x) - model[1](torch.zeros(4)), rtol=1e-5, atol=1e-6)
    to_deterministic(model)
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_weight_shared_with_an_embedding(padding_idx: int | None) -> None:
    """A language model's table and output layer: one mu, rho and prior, one charge, one draw of a function."""
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    to_bayesian(model, prior_sigma=0.5, sigma_init=0.3)
    embedding, output = model
    assert all(getattr(embedding, f"weight_{p}") is getattr(output, f"weight_{p}") for p in ("mu", "rho", "prior_mu"))
    # Padding is neither drawn nor charged where it is looked up, but both where it is an output.
    torch.testing.assert_close(kl_loss(model), output.kl_loss(), rtol=1e-6, atol=0)
    assert (embedding.kl_loss() < output.kl_loss()) == (padding_idx is not None)
    with frozen_sample(model, 1):
        drawn = output(torch.eye(4)).t()
        rows = torch.tensor([i for i in range(7) if i != padding_idx])
        # Two backends of the noise may differ by 1e-5, sigma is 0.3.
        torch.testing.assert_close(embedding(rows), drawn[rows], rtol=1e-5, atol=1e-5)
    model(torch.tensor([1, 2])).sum().backward()
    assert (output.weight_mu.grad.abs().sum(1) > 0).all()
    to_deterministic(model)
    assert model[1].weight is model[0].weight


def test_a_table_whose_output_layer_alone_is_converted() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    to_bayesian(model, where=nn.Linear)
    assert model[1].weight_mu is model[0].weight
    model(torch.tensor([1, 2])).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    to_deterministic(model)
    assert model[1].weight is model[0].weight


def test_dtype_and_device() -> None:
    model = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64), nn.Linear(4, 3, device="meta"))
    before = [(t.dtype, t.device) for t in model.parameters()]
    to_bayesian(model)
    assert {(t.dtype, t.device.type) for t in model[0].state_dict().values()} == {(torch.float64, "cpu")}
    assert {(t.dtype, t.device.type) for t in model[1].state_dict().values()} == {(torch.float32, "meta")}
    to_deterministic(model)
    assert [(t.dtype, t.device) for t in model.parameters()] == before


def test_frozen_parameters_stay_frozen() -> None:
    linear = nn.Linear(5, 4)
    linear.weight.requires_grad_(False)
    layer = to_bayesian(linear)
    assert [p.requires_grad for p in (layer.weight_mu, layer.weight_rho)] == [False, False]
    assert [p.requires_grad for p in (layer.bias_mu, layer.bias_rho)] == [True, True]
    layer(torch.ones(2, 5)).sum().backward()
    assert layer.weight_rho.grad is None
    assert [p.requires_grad for p in to_deterministic(layer).parameters()] == [False, True]


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward_pre": lambda layer, note: layer.register_forward_pre_hook(note),
    "forward": lambda layer, note: layer.register_forward_hook(note),
    "full_backward": lambda layer, note: layer.register_full_backward_hook(note),
    "state_dict_post": lambda layer, note: layer.register_state_dict_post_hook(note),
    "load_state_dict_pre": lambda layer, note: layer.register_load_state_dict_pre_hook(note),
    "load_state_dict_post": lambda layer, note: layer.register_load_state_dict_post_hook(note),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind: str) -> None:
    """Each hook fires on the new layer, is told of it, and its handle still removes it."""
    told: list[type[nn.Module]] = []
    model = nn.Sequential(nn.Linear(5, 4))
    handle = HOOKS[kind](model[0], lambda module, *_: told.append(type(module)))

    def fire() -> None:
        model(torch.ones(2, 5, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())

    to_bayesian(model)
    gc.collect()
    fire()
    assert told == [BayesLinear]
    to_deterministic(model)
    gc.collect()
    fire()
    assert told == [BayesLinear, nn.Linear]
    handle.remove()
    fire()
    assert len(told) == 2


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, ["0", "2.0", "2.1.0.out"]),
        ("0", ["0"]),
        ("2.*", ["2.0", "2.1.0.out"]),
        ("*.out", ["2.1.0.out"]),
        (lambda name, module: module.out_features == 4, ["0", "2.0"]),
        (nn.Linear, ["0", "2.0", "2.1.0.out"]),
        (["0", "*.out"], ["0", "2.1.0.out"]),
        (("2.0", nn.Linear), ["0", "2.0", "2.1.0.out"]),
        ((name for name in ("2.0",)), ["2.0"]),
    ],
    ids=["None", "name", "glob", "glob end", "callable", "class", "list", "mixed", "generator"],
)
def test_where(where: Any, expected: list[str]) -> None:
    model = to_bayesian(nested(), where=where)
    assert [name for name, module in model.named_modules() if isinstance(module, BayesLinear)] == expected


def test_where_of_the_root() -> None:
    assert isinstance(to_bayesian(nn.Linear(5, 4), where=""), BayesLinear)


def test_where_by_the_second_name_of_a_shared_module() -> None:
    linear = nn.Linear(4, 4)
    model = to_bayesian(nn.ModuleDict({"first": linear, "second": linear}), where="second")
    assert isinstance(model["first"], BayesLinear)


def test_moped() -> None:
    """Prior means are the weights, sigma = delta |w|; both survive save and load; a zero weight has a finite KL."""
    model = nested().double()
    with torch.no_grad():
        model[0].weight[1, 2] = 0.0
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    to_bayesian(model, init="moped", delta=0.25, prior_sigma=0.5)
    for name, layer in model.named_modules():
        for part in layer.names() if isinstance(layer, BayesLinear) else []:
            weight, parameter = weights[f"{name}.{part}"], layer.gaussian(part)
            assert torch.equal(parameter.prior_mu, weight)
            assert parameter.prior_sigma.item() == 0.5
            # A weight of 0 gets a sigma that can be learnt.
            sigma = (0.25 * weight.abs()).clamp(min=1e-6)
            torch.testing.assert_close(F.softplus(parameter.rho), sigma, rtol=1e-12, atol=0)
    kl = kl_loss(model)
    assert kl.isfinite()
    with torch.no_grad():
        model[0].weight_mu += 1.0
    loaded = to_bayesian(nested().double())
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(kl_loss(loaded), kl_loss(model))
    # 20 weights moved by 1 = 2 prior sigmas, 2^2 / 2 nats each.
    torch.testing.assert_close(kl_loss(loaded) - kl, torch.tensor(40.0, dtype=torch.float64), rtol=1e-10, atol=0)


def test_subclasses_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    model = nn.Sequential(Scaled(5, 4), nn.Linear(4, 3))
    scaled = model[0]
    to_bayesian(model)
    assert model[0] is scaled
    assert isinstance(model[1], BayesLinear)


def test_transformer_encoder_round_trip() -> None:
    """Converted back, every attribute is as before."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2)
    attributes = [{k: v for k, v in vars(m).items() if k != "_modules"} for m in model.modules()]
    to_bayesian(model)
    twin = copy.deepcopy(model)
    for converted in (model, twin):
        to_deterministic(converted)
    after = [{k: v for k, v in vars(m).items() if k != "_modules"} for m in model.modules()]
    assert [a.keys() for a in after] == [a.keys() for a in attributes]
    for a, b, c in zip(attributes, after, (vars(m) for m in twin.modules()), strict=True):
        for attribute in ("activation_relu_or_gelu", "use_nested_tensor", "in_proj_weight"):
            assert a.get(attribute) == b.get(attribute) == c.get(attribute)


def test_whoever_holds_a_layer_holds_the_converted_one() -> None:
    """A list that dispatches, or a compiled wrapper, would go on calling the deterministic layer."""

    class Dispatching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, second = nn.Linear(5, 4), nn.Linear(4, 3)
            self.second = torch.compile(second, backend="eager")
            self.order = [self.first, self.second]

        def forward(self, x: Tensor) -> Tensor:
            for module in self.order:
                x = module(x)
            return x

    model, x = Dispatching().requires_grad_(False), torch.randn(6, 5)
    before = model(x)
    to_bayesian(model)
    for module in model.order:
        zeros = torch.zeros(1, module.in_features)
        assert not torch.equal(module(zeros), module(zeros))
    predict(model, x, num_samples=2)
    to_deterministic(model)
    torch.testing.assert_close(model(x), before)
    assert vars(model.first).keys() == vars(nn.Linear(5, 4)).keys()

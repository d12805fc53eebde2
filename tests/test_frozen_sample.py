"""frozen_sample and mean_mode: which weights a forward draws."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import draw, network
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fusedbayes import BayesLinear, frozen_sample, kl_loss, mean_mode, predict, to_bayesian, to_deterministic


def test_frozen_sample_is_one_function() -> None:
    """The same for every batch and whatever ran in between; another for another seed or sample; fresh afterwards."""
    model = network().eval()
    x = torch.randn(6, 5)
    generator = torch.get_rng_state()
    with frozen_sample(model, 3):
        first = model(x)
        # A shorter product may be summed in another order.
        torch.testing.assert_close(model(x[2:4]), first[2:4], rtol=1e-6, atol=1e-6)
        assert torch.equal(model(x), first)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(draw(model, x, torch.tensor(3)), first)
    others = [draw(model, x, 4), draw(model, x, 3, sample=1), draw(model, x, 3 + 2**32), model(x), model(x)]
    assert len(torch.stack([first, *others]).flatten(1).unique(dim=0)) == 6


def named(*names: str, layer: BayesLinear | None = None) -> nn.ModuleDict:
    """Layers with the same parameters under different names."""
    layer = layer or BayesLinear(5, 3, sigma_init=0.5)
    return nn.ModuleDict({name: copy.deepcopy(layer) for name in names})


def test_frozen_noise_belongs_to_the_name() -> None:
    """It depends neither on the order of calls nor on which other layers the model has."""
    model = named("a", "b", "c")
    small = named("b", layer=model["b"])
    x = torch.randn(4, 5)
    with frozen_sample(model, 1), frozen_sample(small, 1):
        forwards = {name: model[name](x) for name in ("a", "b", "c")}
        backwards = {name: model[name](x) for name in ("c", "b", "a")}
        alone = small["b"](x)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)
    assert torch.equal(alone, forwards["b"])
    assert len(torch.stack(list(forwards.values())).flatten(1).unique(dim=0)) == 3


def test_names_whose_hashes_collide() -> None:
    """Found by trying: the two names have one number among 2^28, so alone they draw alike; together they must not."""
    first, second = "layer27438", "layer31454"
    together = named(first, second)
    layer = together[first]
    x = torch.randn(4, 5)
    alone = []
    for name in (first, second):
        model = named(name, layer=layer)
        with frozen_sample(model, 1):
            alone.append(model[name](x))
    assert torch.equal(*alone)
    with frozen_sample(together, 1):
        assert not torch.equal(together[first](x), together[second](x))


def test_tied_layers_draw_the_same_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    to_bayesian(model)
    x = torch.randn(3, 4)
    with frozen_sample(model, 1):
        assert torch.equal(model[0](x), model[1](x))


def checkpointed(model: nn.Sequential) -> nn.Module:
    twin = copy.deepcopy(model)
    twin[0] = checkpoint_wrapper(twin[0])
    return checkpoint_wrapper(twin)


def averaged(model: nn.Module) -> nn.Module:
    return torch.compile(torch.optim.swa_utils.AveragedModel(model), backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [lambda model: torch.compile(model, backend="eager"), checkpointed, averaged],
    ids=["compiled", "checkpointed", "averaged and compiled"],
)
def test_wrappers_do_not_change_the_name(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = network().eval()
    x = torch.randn(4, 5)
    expected = draw(model, x)
    torch.testing.assert_close(draw(wrap(model), x), expected, rtol=0, atol=0)
    torch._dynamo.reset()


def test_contexts_nest() -> None:
    model = network().eval()
    x = torch.randn(4, 5)
    outer, inner = draw(model, x, 1), draw(model, x, 2)
    with mean_mode(model):
        mean = model(x)
    with frozen_sample(model, 1):
        with frozen_sample(model, 2):
            assert torch.equal(model(x), inner)
            with mean_mode(model):
                assert torch.equal(model(x), mean)
            assert torch.equal(model(x), inner)
            predict(model, x, 1)
        assert torch.equal(model(x), outer)
        with frozen_sample(model[3], 2):
            assert torch.equal(model[0](x), model[0](x))
            assert not torch.equal(model(x), outer)
        assert torch.equal(model(x), outer)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("context", [lambda m: frozen_sample(m, 1), mean_mode], ids=["frozen_sample", "mean_mode"])
def test_contexts_end_with_an_exception(context: Callable[[nn.Module], Any]) -> None:
    model = network().eval()
    x = torch.randn(4, 5)
    with pytest.raises(KeyError), context(model):
        raise KeyError
    assert not torch.equal(model(x), model(x))


def test_mean_mode_is_the_deterministic_model() -> None:
    model = network().eval()
    x = torch.randn(4, 2, 5)
    generator = torch.get_rng_state()
    with mean_mode(model):
        y = model(x)
    assert torch.equal(y, to_deterministic(copy.deepcopy(model))(x))
    assert torch.equal(torch.get_rng_state(), generator)
    y.sum().backward()
    assert model[0].weight_mu.grad is not None
    assert model[0].weight_rho.grad is None


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (network(), {"seed": "1"}, TypeError, "seed must be an int.*got .*str"),
        (network(), {"seed": True}, TypeError, "seed must be an int.*got .*bool"),
        (network(), {"seed": 1, "sample": -1}, ValueError, "sample must lie in .*, got -1"),
        (network(), {"seed": 1, "sample": 2**32}, ValueError, f"sample must .*got {2**32}"),
        (network(), {"seed": 1, "sample": 0.0}, TypeError, "sample must be an int or .*, got .*float"),
        (nn.ReLU(), {"seed": 1}, ValueError, "model has no Bayesian layer"),
        (3, {"seed": 1}, TypeError, "model must be a .*Module, got .*int"),
    ],
    ids=["str seed", "bool seed", "negative sample", "huge sample", "float sample", "no layer", "no module"],
)
def test_frozen_sample_errors(model: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), frozen_sample(model, **arguments):
        pass
    if isinstance(model, nn.Sequential):
        x = torch.ones(2, 5)
        assert not torch.equal(model[0](x), model[0](x))


def test_mean_mode_errors() -> None:
    with pytest.raises(TypeError, match=r"model must be a .*Module, got .*int"), mean_mode(3):  # type: ignore[arg-type]
        pass


def test_contexts_end_in_any_order() -> None:
    """A generator that holds a context may be closed late; the layers sample afresh once all have ended."""
    model, x = network().eval(), torch.randn(4, 5)
    first, second = frozen_sample(model, 0), frozen_sample(model, 1)
    first.__enter__()
    second.__enter__()
    expected = model(x)
    first.__exit__(None, None, None)
    assert torch.equal(model(x), expected)  # the second one still counts
    second.__exit__(None, None, None)
    assert not torch.equal(model(x), model(x))


def test_parametrized_layers_keep_apart() -> None:
    """A mean that is computed anew at each access has no identity of its own, only its place."""

    class Doubled(nn.Module):
        def forward(self, tensor: Tensor) -> Tensor:
            return 2.0 * tensor

    model = nn.Sequential(*(BayesLinear(5, 5, bias=False) for _ in range(20)))
    for layer in model:
        for name in ("weight_mu", "weight_rho"):
            nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    torch.testing.assert_close(kl_loss(model), torch.stack([layer.kl_loss() for layer in model]).sum())
    noise = []
    with frozen_sample(model, 3):
        for layer in model:
            noise.append(layer(torch.eye(5)) - nn.functional.linear(torch.eye(5), layer.weight_mu))
    assert len(torch.stack(noise).flatten(1).unique(dim=0)) == 20

"""`ELBO`'s KL is fused with the forward: same value and gradients as `kl_loss`, whatever the model does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import EXACT, NUM_DATA, bayes, data, mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedbayes import ELBO, kl_loss, mean_mode


class Wrapped(nn.Module):
    """Runs `body` through `call(body, x)`, together with a layer that the forward does not reach."""

    def __init__(self, body: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.unused = bayes(2, 3)
        self.body = body
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.body, x)


def no_grad(body: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return body(x)


def at_the_mean(body: nn.Module, x: Tensor) -> Tensor:
    with mean_mode(body):
        return body(x)


def within(call: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(bayes(5, 5), Wrapped(nn.Sequential(bayes(5, 4), bayes(4, 5)), call), bayes(5, 3))


def tied(*parts: str) -> nn.Module:
    model = nn.Sequential(bayes(5, 5), nn.Tanh(), bayes(5, 5), bayes(5, 3))
    for part in parts:
        setattr(model[2], part, getattr(model[0], part))
    return model


def frozen(*names: str) -> nn.Module:
    model = mlp()
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


WEIGHT, BIAS = ("weight_mu", "weight_rho"), ("bias_mu", "bias_rho")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "one_layer": lambda: bayes(5, 3),
    "nested_with_linear": lambda: nn.Sequential(nn.Sequential(bayes(5, 4)), nn.Linear(4, 3, dtype=torch.float64)),
    "layer_not_reached": lambda: within(lambda body, x: body(x)),
    "layer_called_twice": lambda: within(lambda body, x: body(body(x))),
    "tied_weight": lambda: tied(*WEIGHT),
    "tied_weight_and_bias": lambda: tied(*WEIGHT, *BIAS),
    "tied_mu_alone": lambda: tied("weight_mu"),
    "frozen_layer": lambda: frozen(*(f"0.{name}" for name in WEIGHT + BIAS)),
    "frozen_mu": lambda: frozen("2.weight_mu", "4.bias_mu"),
    "checkpoint_reentrant": lambda: within(lambda body, x: checkpoint(body, x, use_reentrant=True)),
    "checkpoint_non_reentrant": lambda: within(lambda body, x: checkpoint(body, x, use_reentrant=False)),
    "forward_without_gradients": lambda: within(no_grad),
    "forward_at_the_mean": lambda: within(at_the_mean),
}


class Operators(TorchDispatchMode):
    """Counts the operators of the package that run inside it: how many forwards with and without KL, and bare KLs."""

    def __init__(self) -> None:
        super().__init__()
        self.with_kl = self.without_kl = self.bare_kl = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.fusedbayes.bayes_linear.default:
            has_kl = result[1].numel() > 0
            self.with_kl += has_kl
            self.without_kl += not has_kl
        self.bare_kl += func is torch.ops.fusedbayes.weight_kl.default
        return result


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_fused_loss_has_the_value_and_gradients_of_the_plain_one(build: Callable[[], nn.Module]) -> None:
    model, (x, y) = build(), data()
    weight = 0.7

    torch.manual_seed(5)
    out = ELBO(model, F.cross_entropy, NUM_DATA, kl_weight=weight)(x, y)
    out.loss.backward()
    fused = [p.grad for p in model.parameters()]

    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    nll = F.cross_entropy(model(x), y)
    kl = kl_loss(model)
    (nll + weight * kl / NUM_DATA).backward()

    torch.testing.assert_close(out.nll, nll, **EXACT)
    torch.testing.assert_close(out.kl, kl, **EXACT)
    torch.testing.assert_close(out.loss, nll + weight * kl / NUM_DATA, **EXACT)
    for (name, parameter), grad in zip(model.named_parameters(), fused, strict=True):
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None:
            torch.testing.assert_close(grad, parameter.grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", (3, 0, 0)),
        ("tied_weight_and_bias", (2, 1, 0)),
        ("layer_called_twice", (4, 2, 2)),  # the second call of a layer has no KL; the unused one has weight and bias
        ("layer_not_reached", (4, 0, 2)),
        ("tied_weight", (2, 1, 1)),  # the bias of the tied layer
    ],
)
def test_kl_comes_out_of_the_forward(name: str, expected: tuple[int, int, int]) -> None:
    model, (x, y) = MODELS[name](), data()
    with Operators() as count:
        ELBO(model, F.cross_entropy, NUM_DATA)(x, y)
    assert (count.with_kl, count.without_kl, count.bare_kl) == expected


def test_only_the_first_sample_computes_the_kl() -> None:
    model, (x, y) = mlp(), data()
    with Operators() as count:
        ELBO(model, F.cross_entropy, NUM_DATA, num_samples=4, samples_at_once=1)(x, y)
    assert (count.with_kl, count.without_kl, count.bare_kl) == (3, 9, 0)
    with Operators() as count:
        ELBO(model, F.cross_entropy, NUM_DATA, num_samples=4)(x, y)
    assert (count.with_kl, count.without_kl, count.bare_kl) == (3, 0, 0)


@pytest.mark.parametrize("culprit", ["model", "nll", "schedule"])
def test_an_exception_leaves_nothing_behind(culprit: str) -> None:
    fail = True

    def fails(where: str) -> None:
        if fail and where == culprit:
            raise RuntimeError("out of luck")

    def nll(output: Tensor, target: Tensor) -> Tensor:
        fails("nll")
        return F.cross_entropy(output, target)

    def schedule(step: int) -> float:
        fails("schedule")
        return 1.0

    model, (x, y) = mlp(), data()
    model[3].register_forward_pre_hook(lambda module, args: fails("model"))
    elbo = ELBO(model, nll, NUM_DATA, kl_weight=schedule)
    with pytest.raises(RuntimeError, match="out of luck"):
        elbo(x, y)
    fail = False

    assert elbo.step == 0
    with Operators() as count:
        model(x)
    assert (count.with_kl, count.without_kl) == (0, 3)
    with torch.no_grad():
        model[0].weight_mu.add_(1.0)
    torch.testing.assert_close(elbo(x, y).kl, kl_loss(model), **EXACT)


class FastWeights(nn.Module):
    """Calls its layer with parameters that are twice its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = bayes(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        doubled = {name: 2.0 * parameter for name, parameter in self.layer.named_parameters()}
        return torch.func.functional_call(self.layer, doubled, (x,))


class FrozenFirst(nn.Module):
    """Calls its layer twice, at first with means that do not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = bayes(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight_mu.requires_grad_(False)
        y = self.layer(x)
        self.layer.weight_mu.requires_grad_(True)
        return y + self.layer(x)


@pytest.mark.parametrize("make", [FastWeights, FrozenFirst])
def test_forward_on_other_parameters_does_not_lend_its_kl(make: Callable[[], nn.Module]) -> None:
    model, (x, y) = make(), data()
    kl = ELBO(model, F.cross_entropy, NUM_DATA)(x, y).kl
    torch.testing.assert_close(kl, kl_loss(model), **EXACT)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(kl_loss(model), parameters)
    torch.testing.assert_close(torch.autograd.grad(kl, parameters), expected, **EXACT)

"""BayesLinear on its own: construction, shapes, state, priors, errors, and the moments of what it computes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fusedbayes import BayesLinear, frozen_sample, kl_loss, mean_mode
from fusedbayes.reference import ESTIMATORS


def randomized(layer: BayesLinear) -> BayesLinear:
    """Every mean, sigma and prior different from every other, priors per weight."""
    with torch.no_grad():
        for name in layer.names():
            parameter = layer.gaussian(name)
            parameter.mu.normal_()
            parameter.rho.uniform_(-3.0, 1.0)
            layer.set_prior(torch.randn_like(parameter.mu), torch.rand_like(parameter.mu) + 0.5, name)
    return layer


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


def assert_same_state(layer: nn.Module, state: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(layer.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("fan_in", [1, 7, 640])
def test_default_scales(fan_in: int) -> None:
    layer = BayesLinear(fan_in, 3)
    # Softplus turns rho's relative rounding, 2^-24 |rho| <= 4e-7, into one of sigma; float32 buffers round once.
    close = {"rtol": 1e-6, "atol": 0.0}
    for name in ("weight", "bias"):
        _, rho, prior_mu, prior_sigma = layer.gaussian(name)
        sigma = F.softplus(rho.double())
        torch.testing.assert_close(sigma, torch.full_like(sigma, 0.1 / math.sqrt(fan_in)), **close)
        torch.testing.assert_close(prior_sigma, torch.tensor(1.0 / math.sqrt(fan_in)), **close)
        assert prior_mu.shape == prior_sigma.shape == ()
        assert prior_mu == 0.0


def test_given_scales() -> None:
    layer = BayesLinear(6, 3, prior_mu=-0.25, prior_sigma=2.0, sigma_init=0.5)
    for name in ("weight", "bias"):
        _, rho, prior_mu, prior_sigma = layer.gaussian(name)
        assert (prior_mu.item(), prior_sigma.item()) == (-0.25, 2.0)
        torch.testing.assert_close(F.softplus(rho), torch.full_like(rho, 0.5), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 5), (63, 130)])
def test_means_are_drawn_as_by_torch(sizes: tuple[int, int]) -> None:
    torch.manual_seed(4)
    layer = BayesLinear(*sizes)
    torch.manual_seed(4)
    linear = nn.Linear(*sizes)
    # torch computes the same bound by way of sqrt(3) / sqrt(3): its last float32 bit may differ.
    atol = 2.0**-23 / math.sqrt(sizes[0])
    torch.testing.assert_close(layer.weight_mu, linear.weight, rtol=0, atol=atol)
    torch.testing.assert_close(layer.bias_mu, linear.bias, rtol=0, atol=atol)


@pytest.mark.parametrize("leading", [(), (1,), (6,), (0,), (2, 3), (2, 0, 3), (3, 1, 2, 1)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    layer = BayesLinear(5, 3)
    x = torch.randn(*leading, 5, requires_grad=True)
    with frozen_sample(layer, 1):
        y = layer(x)
        one_by_one = [layer(row) for row in x.detach().reshape(-1, 5)]
    assert y.shape == (*leading, 3)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    if one_by_one:
        # Rows of a product may be summed in another order: five terms of size 1.
        torch.testing.assert_close(y.reshape(-1, 3), torch.stack(one_by_one), rtol=1e-6, atol=1e-6)


def test_non_contiguous_input() -> None:
    layer = BayesLinear(4, 3)
    x = torch.randn(4, 6, 2).transpose(0, 2)
    with frozen_sample(layer, 1):
        torch.testing.assert_close(layer(input=x), layer(x.contiguous()), rtol=1e-6, atol=1e-6)


def test_without_bias() -> None:
    layer = BayesLinear(5, 3, bias=False)
    assert layer.bias_mu is None
    assert layer.bias_rho is None
    assert set(layer.state_dict()) == {"weight_mu", "weight_rho", "weight_prior_mu", "weight_prior_sigma"}
    assert layer(torch.zeros(2, 5)).eq(0.0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    layer = BayesLinear(5, 3, dtype=dtype)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    y = layer(torch.ones(2, 5, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {dtype}
    assert layer.kl_loss().dtype == torch.promote_types(dtype, torch.float32)


def test_device() -> None:
    layer = BayesLinear(5, 3, device="meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.ones(2, 5, device="meta")).shape == (2, 3)
    assert layer.kl_loss().is_meta


@pytest.mark.parametrize("saved_per_weight", [True, False], ids=["saved_per_weight", "saved_scalar"])
@pytest.mark.parametrize("loaded_per_weight", [True, False], ids=["loaded_per_weight", "loaded_scalar"])
def test_state_dict_round_trip(saved_per_weight: bool, loaded_per_weight: bool) -> None:
    saved, loaded = (BayesLinear(5, 3, prior_mu=0.3 * i, prior_sigma=0.5 + i) for i in range(2))
    for layer, per_weight in ((saved, saved_per_weight), (loaded, loaded_per_weight)):
        if per_weight:
            randomized(layer)
    loaded.load_state_dict(saved.state_dict(), strict=True)
    assert_same_state(loaded, snapshot(saved))
    assert torch.equal(loaded.kl_loss(), saved.kl_loss())
    x = torch.randn(4, 5)
    with frozen_sample(saved, 2), frozen_sample(loaded, 2):
        assert torch.equal(loaded(x), saved(x))


def test_load_of_a_prior_that_does_not_fit() -> None:
    layer = BayesLinear(5, 3)
    state = snapshot(layer) | {"weight_prior_sigma": torch.ones(3)}
    with pytest.raises(RuntimeError, match="weight_prior_sigma"):
        layer.load_state_dict(state)
    assert layer.weight_prior_sigma.shape == ()


def test_repr() -> None:
    layer = BayesLinear(5, 3, prior_sigma=0.25)
    assert repr(layer) == (
        "BayesLinear(in_features=5, out_features=3, bias=True, prior_mu=0, prior_sigma=0.25, estimator='shared')"
    )
    layer.set_prior(0.5, torch.ones(3, 5))
    assert "prior_mu=0.5, prior_sigma=per weight" in repr(layer)
    assert "bias=False" in repr(BayesLinear(5, 3, bias=False, device="meta"))


def test_reset_parameters_starts_over() -> None:
    torch.manual_seed(7)
    layer = BayesLinear(5, 3, prior_mu=0.1, prior_sigma=0.7, sigma_init=0.3)
    fresh = snapshot(layer)
    randomized(layer)
    torch.manual_seed(7)
    layer.reset_parameters()
    assert_same_state(layer, fresh)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("form", ["number", "scalar tensor", "per weight"])
def test_set_prior(name: str, form: str) -> None:
    layer = BayesLinear(5, 3, dtype=torch.float64)
    mu, rho, _, _ = layer.gaussian(name)
    other = layer.kl_of("bias" if name == "weight" else "weight")
    mean: Any = -0.25  # exact in every dtype
    sigma: Any = 1.75
    if form == "scalar tensor":
        mean, sigma = torch.tensor(mean), torch.tensor(sigma)
    elif form == "per weight":
        mean, sigma = torch.randn_like(mu, requires_grad=True), torch.rand_like(mu) + 0.1
    layer.set_prior(mean, sigma, name)
    mean, sigma = (torch.as_tensor(value).double() for value in (mean, sigma))
    expected = kl_divergence(Normal(mu, F.softplus(rho)), Normal(mean, sigma)).sum()
    torch.testing.assert_close(layer.kl_of(name), expected, rtol=1e-12, atol=0)
    assert torch.equal(layer.kl_of("bias" if name == "weight" else "weight"), other)
    assert layer.kl_loss().requires_grad
    assert not layer.gaussian(name).prior_mu.requires_grad


def test_set_sigma() -> None:
    layer = BayesLinear(5, 3)
    values = torch.rand(3, 5) + 0.1
    layer.set_sigma(values)
    layer.set_sigma(torch.tensor(0.25), "bias")
    # rho is rounded to 2^-24 of its value, which is 2 at most here.
    torch.testing.assert_close(F.softplus(layer.weight_rho), values, rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(F.softplus(layer.bias_rho), torch.full((3,), 0.25), rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.1, "weights"), ValueError, "name must be one of 'weight', 'bias', got 'weights'"),
        ((0.0,), ValueError, "sigma must be finite and positive, got 0.0"),
        ((True,), TypeError, "sigma must be a number, got True"),
        ((None,), TypeError, "sigma must be a number, got NoneType"),
        ((1e39,), ValueError, "sigma must lie in .* torch.float32, got 1e"),
        ((-torch.ones(3, 5),), ValueError, "sigma must be finite and positive in torch.float32, got tensor"),
        ((torch.tensor(math.nan),), ValueError, "sigma must be finite and positive"),
        ((torch.ones(5),), ValueError, r"sigma must have shape \(\) or \(3, 5\), got \(5,\)"),
        ((torch.ones(3, 5, dtype=torch.int64),), TypeError, "sigma must be a number or a floating-point tensor"),
    ],
)
def test_set_sigma_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    layer = BayesLinear(5, 3)
    before = layer.weight_rho.clone()
    with pytest.raises(error, match=message):
        layer.set_sigma(*arguments)
    assert torch.equal(layer.weight_rho, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 1.0, "weights"), ValueError, "name must be one of 'weight'.*got 'weights'"),
        ((0.0, 1.0, "bias"), ValueError, "name must be one of 'weight', got 'bias'"),
        ((0.0, 0.0), ValueError, "prior_sigma must be finite and positive, got 0"),
        ((0.0, -1.5), ValueError, "prior_sigma must be finite and positive, got -1.5"),
        ((math.nan, 1.0), ValueError, "prior_mu must be finite, got nan"),
        ((torch.tensor(math.inf), 1.0), ValueError, "prior_mu must be finite"),
        ((0.0, torch.eye(3, 5)), ValueError, "prior_sigma must be finite and positive"),
        ((0.0, torch.ones(5)), ValueError, r"prior_sigma must have shape \(\) or \(3, 5\), got \(5,\)"),
        ((torch.zeros(5, 3), 1.0), ValueError, r"prior_mu must have shape \(\) or \(3, 5\), got \(5, 3\)"),
        ((torch.zeros((), dtype=torch.long), 1.0), TypeError, "prior_mu must be .*int64"),
        (
            (0.0, torch.full((3, 5), 1e-50, dtype=torch.double)),
            ValueError,
            "prior_sigma must be finite and positive in .*float32",
        ),
        (("0", 1.0), TypeError, "prior_mu must be a number, got .*str"),
        ((0.0, None), TypeError, "prior_sigma must be a number, got NoneType"),
    ],
)
def test_set_prior_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    layer = BayesLinear(5, 3, bias=False)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        layer.set_prior(*arguments)
    assert_same_state(layer, before)


@pytest.mark.parametrize("value", ["magic", "", None, ["shared"]], ids=repr)
def test_unknown_estimator_leaves_the_layer_as_it_was(value: Any) -> None:
    layer = BayesLinear(5, 3)
    with pytest.raises(ValueError, match=r"estimator must be one of 'shared'.*, got"):
        layer.estimator = value
    assert layer.estimator == "shared"
    assert layer(torch.ones(2, 5)).shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"out_features": -2}, ValueError, "out_features must be at least 1, got -2"),
        ({"in_features": 2.0}, TypeError, "in_features must be an int, got .*float"),
        ({"out_features": True}, TypeError, "out_features must be an int, got .*bool"),
        ({"prior_mu": math.nan}, ValueError, "prior_mu must be finite, got nan"),
        ({"prior_mu": None}, TypeError, "prior_mu must be a number, got NoneType"),
        ({"prior_sigma": 0.0}, ValueError, "prior_sigma must be finite and positive, got 0.0"),
        ({"prior_sigma": -1.0}, ValueError, "prior_sigma must be finite and positive, got -1.0"),
        ({"prior_sigma": torch.ones(3, 5)}, TypeError, "prior_sigma must be a number, got a tensor"),
        ({"sigma_init": math.inf}, ValueError, "sigma_init must be finite and positive, got inf"),
        ({"sigma_init": -0.1}, ValueError, "sigma_init must be finite and positive, got -0.1"),
        ({"sigma_init": "small"}, TypeError, "sigma_init must be a number, got .*str"),
        ({"estimator": "magic"}, ValueError, "estimator must be one of 'shared'.*, got 'magic'"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point torch.dtype, got torch.int64"),
        ({"dtype": "float32"}, TypeError, "dtype must be .*, got "),
        ({"prior_sigma": 1e-8, "dtype": torch.half}, ValueError, "prior_sigma must lie in .* torch.float16, got 1e-08"),
        ({"prior_mu": 10**400}, ValueError, "prior_mu must be finite, got 1000"),
        ({"sigma_init": 1e39}, ValueError, "sigma_init must lie in .* torch.float32, got 1e"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    generator = torch.get_rng_state()
    with pytest.raises(error, match=message):
        BayesLinear(**({"in_features": 5, "out_features": 3} | arguments))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("mode", ["sampling", "mean"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 4), ValueError, r"x must have shape \(\.\.\., 5\).*got \(2, 4\)"),
        (torch.ones(()), ValueError, r"x must have shape \(\.\.\., 5\).*got \(\)"),
        (torch.ones(2, 5, device="meta"), ValueError, "x must be on the device of weight_mu, cpu, got meta"),
        (torch.ones(2, 5, dtype=torch.float64), TypeError, "x must have the dtype .*float32.*got torch.float64"),
        (torch.ones(2, 5, dtype=torch.int64), TypeError, "x must be a floating-point tensor, got .*int64"),
        ([[1.0] * 5], TypeError, "x must be a floating-point tensor, got list"),
    ],
    ids=["features", "0-d", "device", "float64", "int64", "list"],
)
def test_forward_errors_leave_layer_and_generator_as_they_were(
    mode: str, x: Any, error: type[Exception], message: str
) -> None:
    layer = BayesLinear(5, 3)
    before, generator = snapshot(layer), torch.get_rng_state()
    if mode == "mean":
        with mean_mode(layer), pytest.raises(error, match=message):
            layer(x)
    else:
        with pytest.raises(error, match=message):
            layer(x)
    assert_same_state(layer, before)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_moments_of_the_output(estimator: str) -> None:
    """y ~ N(x mu^T + b, x^2 (sigma^2)^T + sigma_b^2): mean and variance within five standard errors."""
    outputs, copies, forwards = 3, 400, 20
    layer = BayesLinear(5, copies * outputs, estimator=estimator)
    kind = randomized(BayesLinear(5, outputs))
    with torch.no_grad():  # outputs with equal parameters are independent draws of one distribution
        for ours, theirs in zip(layer.parameters(), kind.parameters(), strict=True):
            ours.copy_(theirs.repeat(copies, *[1] * (theirs.dim() - 1)))
    x = torch.randn(4, 5)
    y = torch.cat([layer(x).detach().double().view(4, copies, outputs) for _ in range(forwards)], 1)
    mu, rho, bias_mu, bias_rho = (p.detach().double() for p in kind.parameters())
    mean = x.double() @ mu.t() + bias_mu
    variance = x.double() ** 2 @ (F.softplus(rho) ** 2).t() + F.softplus(bias_rho) ** 2
    draws = copies * forwards
    assert ((y.mean(1) - mean).abs() < 5.0 * (variance / draws).sqrt()).all()
    assert ((y.var(1) - variance).abs() < 5.0 * variance * math.sqrt(2.0 / (draws - 1))).all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kl_is_that_of_torch_distributions(dtype: torch.dtype, bias: bool) -> None:
    layer = randomized(BayesLinear(17, 9, bias, dtype=dtype))
    terms = []
    for name in layer.names():
        mu, rho, prior_mu, prior_sigma = (t.double() for t in layer.gaussian(name))
        terms.append(kl_divergence(Normal(mu, F.softplus(rho)), Normal(prior_mu, prior_sigma)).flatten())
    expected = torch.cat(terms).sum()
    # A weight's KL is about ten roundings of parts of its own size; no KL is negative, so the sum adds no cancellation.
    rtol = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.kl_loss().double(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(kl_loss(layer).double(), expected, rtol=rtol, atol=0)

"""The stateless functions: leading dimensions, priors, seeds, and errors that name argument, value and expectation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedbayes
from fusedbayes import functional, reference
from fusedbayes.noise import Address, draw_seed
from fusedbayes.reference import GaussianParameter

N, K = 3, 5


def linear_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    shapes = {"x": (4, K), "weight_mu": (N, K), "weight_rho": (N, K), "bias_mu": (N,), "bias_rho": (N,)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 0, 3), (1, 1, 1, 2)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    arguments = linear_arguments() | {"x": torch.randn(*leading, K)}
    y, kl = functional.bayes_linear(**arguments, seed=1)
    expected, _ = functional.bayes_linear(**arguments | {"x": arguments["x"].reshape(-1, K)}, seed=1)
    assert y.shape == (*leading, N)
    assert torch.equal(y.reshape(-1, N), expected)
    assert kl is None


def test_a_permuted_batch() -> None:
    arguments = linear_arguments()
    x = torch.randn(K, 2, 6).permute(2, 1, 0)
    y, _ = functional.bayes_linear(**arguments | {"x": x}, seed=1)
    expected, _ = functional.bayes_linear(**arguments | {"x": x.contiguous()}, seed=1)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # perhaps another order of summation


@pytest.mark.parametrize("shape", [(), (K,), (N, 1), (N, K)], ids=str)
def test_priors_broadcast(shape: tuple[int, ...]) -> None:
    arguments = linear_arguments(torch.float64)
    prior = torch.randn(shape, dtype=torch.float64), 0.5 + torch.rand(shape, dtype=torch.float64)
    _, kl = functional.bayes_linear(**arguments, weight_prior=prior, bias_prior=(0.25, 2.0))
    weight = [arguments["weight_mu"], arguments["weight_rho"], *prior]
    numbers = (torch.tensor(value, dtype=torch.float64) for value in (0.25, 2.0))
    bias = [arguments["bias_mu"], arguments["bias_rho"], *numbers]
    expected = sum(reference.weight_kl(GaussianParameter(*parameter)) for parameter in (weight, bias))
    torch.testing.assert_close(kl, expected, rtol=1e-14, atol=0)
    sampled_kl = functional.sample_weight(*weight[:2], prior=prior)[1]
    assert sampled_kl == functional.weight_kl(*weight[:2], prior)
    torch.testing.assert_close(sampled_kl, reference.weight_kl(GaussianParameter(*weight)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(), (6,), (3, 5), (2, 3, 4)], ids=str)
def test_sample_weight_of_any_shape(shape: tuple[int, ...]) -> None:
    mu, rho = torch.randn(2, *shape)
    address = Address(stream=3, row_offset=2, column_offset=5)
    weight, kl = functional.sample_weight(mu, rho, seed=4, sample=1, address=address, dtype=torch.float16)
    assert kl is None
    assert torch.equal(weight, reference.sample_weight(mu, rho, torch.tensor(4), 1, address, torch.float16))


def test_a_permuted_parameter_is_sampled_like_a_contiguous_one() -> None:
    mu, rho = (torch.randn(4, 2, 3).permute(2, 0, 1) for _ in range(2))
    weight, kl = functional.sample_weight(mu, rho, prior=(0.0, 1.0), seed=4)
    expected, expected_kl = functional.sample_weight(mu.contiguous(), rho.contiguous(), prior=(0.0, 1.0), seed=4)
    assert torch.equal(weight, expected)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-6, atol=0)


def test_a_seed_is_drawn_from_the_generator_of_torch_unless_given() -> None:
    arguments = linear_arguments()
    torch.manual_seed(6)
    first, second = (functional.bayes_linear(**arguments)[0] for _ in range(2))
    torch.manual_seed(6)
    expected = functional.bayes_linear(**arguments, seed=draw_seed())[0]
    assert torch.equal(first, expected)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "where",
    [{"weight_address": Address(40)}, {"bias_address": Address(40)}, {"sample": 1}, {"sample": torch.tensor(2)}],
    ids=str,
)
def test_sample_and_addresses_reach_the_noise(where: dict[str, Any]) -> None:
    arguments = linear_arguments()
    y = functional.bayes_linear(**arguments, seed=2)[0]
    assert torch.equal(functional.bayes_linear(**arguments, seed=2, sample=0)[0], y)
    assert not torch.allclose(functional.bayes_linear(**arguments, seed=2, **where)[0], y)


def test_without_kl_there_is_none() -> None:
    prior = {"weight_prior": (0.0, 1.0), "bias_prior": (0.0, 1.0)}
    assert functional.bayes_linear(**linear_arguments(), **prior, with_kl=False)[1] is None


META = torch.empty(N, K, device="meta")
LEARNT = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a floating-point tensor, got list"),
        ({"x": torch.ones(4, K, dtype=torch.int32)}, TypeError, r"x must be .* got a tensor of dtype torch\.int32"),
        ({"x": torch.ones(())}, ValueError, r"x must have shape \(\.\.\., 5\) .* got \(\)"),
        ({"x": torch.ones(4, 6)}, ValueError, r"x must have shape \(\.\.\., 5\) .* got \(4, 6\)"),
        ({"x": META}, ValueError, "x must be on the device of weight_mu, cpu, got meta"),
        ({"x": torch.ones(4, K).double()}, TypeError, r"x must have the dtype of weight_mu, torch\.float32.*float64"),
        ({"weight_mu": None}, TypeError, "weight_mu must be a floating-point tensor, got None"),
        ({"weight_rho": torch.ones(N, K).long()}, TypeError, r"weight_rho must be .* got .* torch\.int64"),
        ({"weight_rho": torch.ones(N, K).half()}, TypeError, r"weight_rho must have the dtype of weight_mu.*float16"),
        ({"weight_rho": torch.ones(K, N)}, ValueError, r"weight_rho must have the shape .* \(3, 5\), got \(5, 3\)"),
        ({"weight_rho": META}, ValueError, "weight_rho must be on the device of weight_mu, cpu, got meta"),
        (
            {"weight_mu": torch.ones(K), "weight_rho": torch.ones(K)},
            ValueError,
            r"weight_mu must have shape \(out_features, in_features\), got \(5,\)",
        ),
        ({"bias_rho": None}, ValueError, "bias_mu and bias_rho must be given together"),
        ({"bias_rho": torch.ones(4)}, ValueError, r"bias_rho must have the shape of bias_mu, \(3,\), got \(4,\)"),
        (
            {"bias_mu": torch.ones(4), "bias_rho": torch.ones(4)},
            ValueError,
            r"bias_mu must have shape \(3,\), got \(4,\)",
        ),
        (
            {"bias_mu": torch.ones(N).double(), "bias_rho": torch.ones(N).double()},
            TypeError,
            r"bias_mu must have the dtype of weight_mu, torch\.float32, got torch\.float64",
        ),
        (
            {"bias_mu": META[:, 0], "bias_rho": META[:, 0]},
            ValueError,
            "bias_mu must be on the device of weight_mu, cpu, got meta",
        ),
        ({"weight_prior": (0.0, 1.0)}, ValueError, "bias_prior must be given exactly when"),
        ({"bias_prior": (0.0, 1.0)}, ValueError, "bias_prior is given without weight_prior"),
        (
            {"weight_prior": (0.0, 1.0), "bias_prior": (0.0, 1.0), "bias_mu": None, "bias_rho": None},
            ValueError,
            "bias_prior must be given exactly when",
        ),
        (
            {"weight_prior": (0.0, 1.0), "bias_prior": (0.0, -1.0)},
            ValueError,
            r"bias_prior_sigma must be finite and positive, got -1\.0",
        ),
        ({"weight_address": Address(stream=-1)}, ValueError, "stream must not be negative, got -1"),
        ({"bias_address": Address(column_offset=2**34)}, ValueError, r"column_offset \+ columns must address less"),
        ({"sample": -1}, ValueError, rf"sample must lie in \[0, {2**32}\), got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got 0.5"),
    ],
)
def test_bayes_linear_names_a_bad_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.bayes_linear(**linear_arguments() | change)


PRIOR_ERRORS = [
    (1.0, TypeError, r"prior must be a tuple \(prior_mu, prior_sigma\), got 1\.0"),
    ((0.0,), TypeError, r"prior must be a tuple .* got \(0\.0,\)"),
    (("0", 1.0), TypeError, "prior_mu must be a number, got '0'"),
    ((float("nan"), 1.0), ValueError, "prior_mu must be finite, got nan"),
    ((0.0, 0), ValueError, "prior_sigma must be finite and positive, got 0"),
    ((0.0, float("inf")), ValueError, "prior_sigma must be finite and positive, got inf"),
    ((0.0, True), TypeError, "prior_sigma must be a number, got True"),
    ((torch.zeros((), dtype=torch.int64), 1.0), TypeError, r"prior_mu must be a floating-point .* torch\.int64"),
    ((0.0, torch.ones(N)), ValueError, r"prior_sigma must broadcast to the shape of mu, \(3, 5\), got \(3,\)"),
    ((0.0, torch.ones(2, N, K)), ValueError, r"prior_sigma must broadcast to .* \(3, 5\), got \(2, 3, 5\)"),
    ((META, 1.0), ValueError, "prior_mu must be on the device of mu, cpu, got meta"),
    ((0.0, LEARNT), ValueError, "prior requires grad, but the fused KL has no gradient for the prior"),
]


@pytest.mark.parametrize(("prior", "error", "message"), PRIOR_ERRORS)
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(
            lambda prior: functional.sample_weight(torch.ones(N, K), torch.ones(N, K), prior=prior), id="sample"
        ),
        pytest.param(lambda prior: functional.weight_kl(torch.ones(N, K), torch.ones(N, K), prior), id="kl"),
    ],
)
def test_bad_prior_is_named(function: Callable[[Any], Any], prior: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(prior)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mu": 1.0, "sigma": 1.0}, TypeError, "mu must be a floating-point tensor, got 1.0"),
        ({"mu": torch.ones(2).int(), "sigma": 1.0}, TypeError, r"mu must be .* got a tensor of dtype torch\.int32"),
        ({}, TypeError, "exactly one of sigma and log_var, got neither"),
        ({"sigma": 1.0, "log_var": torch.zeros(2)}, TypeError, "exactly one of sigma and log_var, got both"),
        ({"sigma": 1.0, "reduction": "median"}, ValueError, "reduction must be 'sum', .* got 'median'"),
        ({"sigma": -0.5}, ValueError, r"sigma must be finite and positive, got -0\.5"),
        ({"sigma": torch.ones(4)}, ValueError, r"sigma must broadcast to the shape of mu, \(2, 3\), got \(4,\)"),
        ({"log_var": torch.ones(3, 2)}, ValueError, r"log_var must broadcast .* \(2, 3\), got \(3, 2\)"),
        ({"log_var": torch.ones(3).int()}, TypeError, r"log_var must be a floating-point .* torch\.int32"),
        ({"sigma": 1.0, "prior_sigma": 0.0}, ValueError, r"prior_sigma must be finite and positive, got 0\.0"),
        ({"sigma": 1.0, "prior_mu": "0"}, TypeError, "prior_mu must be a number, got '0'"),
        (
            {"mu": torch.ones(()), "sigma": 1.0, "reduction": "batchmean"},
            ValueError,
            r"'batchmean' needs a non-empty first dimension, got mu of shape \(\)",
        ),
        ({"mu": torch.ones(0, 3), "sigma": 1.0, "reduction": "batchmean"}, ValueError, r"got mu of shape \(0, 3\)"),
    ],
)
def test_gaussian_kl_names_a_bad_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedbayes.gaussian_kl(**({"mu": torch.ones(2, 3)} | arguments))


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(
            lambda: functional.bayes_linear(**linear_arguments() | {"x": torch.ones(4, K + 1)}), id="bayes_linear-x"
        ),
        pytest.param(
            lambda: functional.bayes_linear(**linear_arguments(), weight_prior=(0.0, 1.0), bias_prior=(0.0, -1.0)),
            id="bayes_linear-prior",
        ),
        pytest.param(
            lambda: functional.sample_weight(torch.ones(N, K), torch.ones(N, K), prior=(0.0, -1.0)),
            id="sample_weight-prior",
        ),
        pytest.param(
            lambda: functional.sample_weight(torch.ones(N, K), torch.ones(N, K), sample=-1),
            id="sample_weight-sample",
        ),
    ],
)
def test_a_call_that_raises_has_drawn_no_seed(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr("fusedbayes.arguments.draw_seed", lambda device: drawn.append(draw_seed(device)) or drawn[-1])
    with pytest.raises(ValueError):
        call()
    assert not drawn

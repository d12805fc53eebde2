"""Triton kernels of the estimators and of several Monte Carlo samples, against the operators in double precision."""

from dataclasses import replace

import pytest
import torch
from problems import DTYPES, check_bayes_linear, check_input_gradient, check_weight_gradients, make_problem

from fusedbayes import kernels
from fusedbayes.kernels import MatmulConfig
from fusedbayes.noise import Address
from fusedbayes.reference import Estimator

ops = torch.ops.fusedbayes
CASES = pytest.mark.parametrize(
    ("estimator", "num_samples"), [("shared", 3), ("local", 1), ("local", 3), ("flipout", 1), ("flipout", 3)]
)
SHAPE = (5, 21, 28)  # M, N, K: two tiles of outputs and of inputs, the second ragged
SINGLE_PASS = MatmulConfig(16, 16, 16)
SPLIT = replace(SINGLE_PASS, splits=2)
SEVERAL_SAMPLES = replace(SINGLE_PASS, samples=2)  # of three: the last program repeats one
TWO_PASSES = replace(SINGLE_PASS, single_pass=False)


def check(
    estimator: Estimator,
    num_samples: int,
    config: MatmulConfig | None,
    device: str,
    shape: tuple[int, int, int] = SHAPE,
    **options: object,
) -> None:
    problem = make_problem(shape, estimator=estimator, num_samples=num_samples, **options)
    check_bayes_linear(problem, config, device)
    check_input_gradient(problem, config, device)
    check_weight_gradients(problem, config, device)


# Two steps of the selected configuration, too, which has a wider tile.
@pytest.mark.parametrize(
    ("config", "shape"),
    [(SINGLE_PASS, SHAPE), (TWO_PASSES, SHAPE), (None, (5, 21, 44))],
    ids=["single-pass", "two-passes", "selected"],
)
@CASES
def test_results_and_gradients(
    kernel_device: str,
    estimator: Estimator,
    num_samples: int,
    config: MatmulConfig | None,
    shape: tuple[int, int, int],
) -> None:
    check(estimator, num_samples, config, kernel_device, shape)


@CASES
def test_splits(kernel_device: str, estimator: Estimator, num_samples: int) -> None:
    """Of y over three tiles of inputs, so that the second has one less, and of dX over two of outputs."""
    problem = make_problem((5, 21, 44), estimator=estimator, num_samples=num_samples)
    check_bayes_linear(problem, SPLIT, kernel_device)
    check_input_gradient(problem, SPLIT, kernel_device)


def test_several_samples_of_a_program(kernel_device: str) -> None:
    """Which only the forward pass of a shared weight has."""
    check_bayes_linear(make_problem(SHAPE, num_samples=3), SEVERAL_SAMPLES, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@CASES
def test_16_bit_products(kernel_device: str, estimator: Estimator, num_samples: int, dtype: torch.dtype) -> None:
    check(estimator, num_samples, SINGLE_PASS, kernel_device, dtype=dtype)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((5, 33, 64), {}), ((3, 21, 44), {"prior": "per-weight"}), ((3, 64, 36), {"prior": "none"})],
    ids=["blocks", "masked", "no-prior"],
)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_weights_drawn_in_fragments(
    kernel_device: str, shape: tuple[int, int, int], options: dict[str, object], dtype: torch.dtype
) -> None:
    problem = make_problem(shape, num_samples=3, dtype=dtype, **options)
    check_bayes_linear(problem, MatmulConfig(16, 32, 32, samples=2), kernel_device)


@pytest.mark.parametrize(
    "options",
    [
        {"prior": "none", "bias": False},
        {"prior": "per-weight", "sample": None},
        {"parameter_dtype": torch.bfloat16, "dtype": torch.bfloat16},
        {"shape": (3, 5, 7)},
        {"shape": (0, 5, 8)},
        {"shape": (17, 16, 32), "weight_address": Address(8, 3, 16)},
        {"shape": (3, 17, 20), "weight_address": Address(8, 3, 6)},
    ],
    ids=["no-prior", "prior-per-weight", "bf16-parameters", "ragged", "no-rows", "shard", "shard-within-a-quad"],
)
@pytest.mark.parametrize(("estimator", "num_samples"), [("shared", 2), ("local", 2), ("flipout", 2)])
def test_options(kernel_device: str, estimator: Estimator, num_samples: int, options: dict[str, object]) -> None:
    check(estimator, num_samples, SINGLE_PASS, kernel_device, **options)


@pytest.mark.parametrize("config", [SINGLE_PASS, TWO_PASSES], ids=["single-pass", "two-passes"])
@pytest.mark.parametrize("estimator", ["shared", "local", "flipout"])
def test_one_input_for_all_samples(kernel_device: str, estimator: Estimator, config: MatmulConfig) -> None:
    problem = make_problem(SHAPE, estimator=estimator, num_samples=3).to(kernel_device)
    x = problem.x[:5]
    x_at, *rest = problem._replace(x=x).forward
    same_input = [True if value is False else value for value in rest]
    one = kernels.bayes_linear(x_at, *same_input, config=config)
    repeated = kernels.bayes_linear(*problem._replace(x=x.repeat(3, 1)).forward, config=config)
    for actual, expected in zip(one, repeated, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # perhaps other sums


def test_zero_rows_have_no_slope(kernel_device: str) -> None:
    problem = make_problem((4, 18, 20), estimator="local", bias=False)
    problem.x[1] = 0.0
    y, _, slope = kernels.bayes_linear(*problem.to(kernel_device).forward, config=SINGLE_PASS)
    assert y[1].eq(0.0).all()
    assert slope[1].eq(0.0).all()
    assert slope.isfinite().all()


@pytest.mark.parametrize(("estimator", "num_samples"), [("shared", 3), ("local", 3), ("flipout", 3)])
def test_a_run_repeats_bit_for_bit(kernel_device: str, estimator: Estimator, num_samples: int) -> None:
    problem = make_problem(SHAPE, estimator=estimator, num_samples=num_samples).to(kernel_device)
    runs = [
        (
            *kernels.bayes_linear(*problem.forward, config=SPLIT),
            *kernels.bayes_linear_backward(*problem.backward, config=SPLIT),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))

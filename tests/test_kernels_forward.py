"""Forward kernels, interpreted or compiled, against the operators in PyTorch at double precision."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import (
    DTYPES,
    EXTREME_RHO,
    PRIORS,
    Problem,
    assert_close,
    assert_kl_close,
    check_bayes_linear,
    check_input_gradient,
    make_parameter,
    make_problem,
)
from torch import Tensor
from triton.runtime import interpreter

from fusedbayes import kernels, reference
from fusedbayes.kernels import MatmulConfig, TileConfig
from fusedbayes.kernels.sums import arrival_counters
from fusedbayes.noise import Address

ops = torch.ops.fusedbayes

# Small enough that (33, 37, 44) takes several tiles along every axis, with a ragged last one.
TILE = TileConfig(block_n=16, block_k=16)
SINGLE_PASS = MatmulConfig(16, 16, 16)
SPLIT = replace(SINGLE_PASS, splits=2)
MORE_SPLITS = replace(SINGLE_PASS, splits=3)
X_FIRST = MatmulConfig(64, 16, 16, num_warps=8, splits=2)
UNROLLED = replace(SINGLE_PASS, unroll=2)
SAMPLE_ONCE = replace(SINGLE_PASS, single_pass=False)
CONFIGS = pytest.mark.parametrize(
    "config",
    [SINGLE_PASS, SPLIT, UNROLLED, X_FIRST, SAMPLE_ONCE, None],
    ids=["single-pass", "split", "unrolled", "x-first", "sample-once", "selected"],
)


@CONFIGS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 37, 44), (1, 21, 36), (33, 5, 7), (3, 1, 1), (0, 5, 3)], ids=str)
def test_bayes_linear(
    kernel_device: str, shape: tuple[int, int, int], dtype: torch.dtype, config: MatmulConfig | None
) -> None:
    check_bayes_linear(make_problem(shape, dtype=dtype), config, kernel_device)


def run_both(problem: Problem, config: MatmulConfig) -> list[Tensor]:
    """y and KL, and dX."""
    grad_x = kernels.bayes_linear_backward(*problem.backward_input, config=config)[0]
    return [*kernels.bayes_linear(*problem.forward, config=config)[:2], grad_x]


@pytest.mark.parametrize(
    ("config", "num_samples"),
    [(SPLIT, 1), (MORE_SPLITS, 2), (X_FIRST, 2)],
    ids=["two", "three-2-samples", "x-first-2-samples"],
)
def test_splits_of_a_sum(kernel_device: str, config: MatmulConfig, num_samples: int) -> None:
    """Launch after launch they add up to the same bits, and their counters are zeros again."""
    problem = make_problem((17, 21, 44), num_samples=num_samples)
    y, kl = check_bayes_linear(problem, config, kernel_device)
    first = y, kl, check_input_gradient(problem, config, kernel_device)
    moved = problem.to(kernel_device)
    again = run_both(moved, config)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not arrival_counters(moved.x, 1).any()


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("block_m", [16, 128], ids=["parts-at-once", "one-part-after-another"])
def test_the_split_that_comes_last_changes_nothing(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, block_m: int, last: int
) -> None:
    if kernel_device != "cpu":
        pytest.skip("a GPU starts programs as it likes")
    config = MatmulConfig(block_m, 16, 16, num_warps=1, splits=3)
    problem = make_problem((5, 48, 48))
    expected = run_both(problem, config)
    builder = interpreter.interpreter_builder
    call = builder.set_grid_idx

    def in_another_order(x: int, y: int, z: int) -> None:
        assert builder.grid_dim[1] == 3
        call(x, (y + last + 1) % 3, z)

    monkeypatch.setattr(builder, "set_grid_idx", in_another_order)
    assert all(torch.equal(a, b) for a, b in zip(run_both(problem, config), expected, strict=True))
    assert not arrival_counters(problem.x, 1).any()


def test_counters_for_any_number_of_tiles() -> None:
    like = torch.empty(0)
    assert arrival_counters(like, 1) is arrival_counters(like, 2)
    number = arrival_counters(like, 1).numel() + 1
    assert arrival_counters(like, number).shape == (number,)
    assert not arrival_counters(like, number).any()


@pytest.mark.parametrize("config", [SINGLE_PASS, SAMPLE_ONCE], ids=["single-pass", "sample-once"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("prior", PRIORS)
def test_priors_and_bias_of_bayes_linear(kernel_device: str, prior: str, bias: bool, config: MatmulConfig) -> None:
    check_bayes_linear(make_problem((5, 18, 20), prior=prior, bias=bias), config, kernel_device)


@pytest.mark.parametrize("config", [SINGLE_PASS, SAMPLE_ONCE], ids=["single-pass", "sample-once"])
@pytest.mark.parametrize("options", [{"with_kl": False}, {"sample": None}, {"sample": 2**32 - 1}], ids=str)
def test_options_of_bayes_linear(kernel_device: str, options: dict[str, Any], config: MatmulConfig) -> None:
    check_bayes_linear(make_problem((5, 18, 20), **options), config, kernel_device)


@CONFIGS
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_parameters_of_bayes_linear(kernel_device: str, dtype: torch.dtype, config: MatmulConfig | None) -> None:
    problem = make_problem((5, 18, 20), dtype=dtype, parameter_dtype=dtype, prior="per-weight")
    check_bayes_linear(problem, config, kernel_device)


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_weight(kernel_device: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    problem = make_problem((1, 17, 21), parameter_dtype=parameter_dtype)
    weight, kl = kernels.sample_weight(*problem.to(kernel_device).sample_weight(dtype), config=TILE)
    expected, expected_kl = ops.sample_weight(*problem.exact().sample_weight(torch.float64))
    assert weight.dtype == dtype
    # However wide the sample is, it is rounded once: the noise's error is that of fp32.
    assert_close(weight, expected, terms=1, operands=torch.float32)
    assert_kl_close(kl, expected_kl, weights=17 * 21)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 1), (16, 16), (33, 2)], ids=str)
@pytest.mark.parametrize("config", [TILE, None], ids=["small-tiles", "selected"])
def test_shapes_of_sample_weight(kernel_device: str, shape: tuple[int, int], config: TileConfig | None) -> None:
    problem = make_problem((1, *shape), prior="none")
    weight, kl = kernels.sample_weight(*problem.to(kernel_device).sample_weight(torch.float32), config=config)
    expected, _ = ops.sample_weight(*problem.exact().sample_weight(torch.float64))
    assert_close(weight, expected, terms=1, operands=torch.float32)
    assert kl.shape == (0,)


@pytest.mark.parametrize("prior", ["scalar", "per-weight"])
@pytest.mark.parametrize("column_offset", [0, 1])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_no_weights(kernel_device: str, shape: tuple[int, int], column_offset: int, prior: str) -> None:
    problem = make_problem((2, *shape), prior=prior, weight_address=Address(8, column_offset=column_offset))
    moved = problem.to(kernel_device)
    weight, kl = kernels.sample_weight(*moved.sample_weight(torch.float32))
    assert weight.shape == shape
    assert kl == 0
    assert kernels.weight_kl(*moved.weight) == 0
    for config in (SINGLE_PASS, SAMPLE_ONCE):
        check_bayes_linear(problem, config, kernel_device)


@pytest.mark.parametrize("prior", PRIORS[1:])
@pytest.mark.parametrize("config", [TILE, None], ids=["small-tiles", "selected"])
def test_weight_kl(kernel_device: str, prior: str, config: TileConfig | None) -> None:
    parameter = make_parameter((17, 21), torch.float32, prior)
    kl = kernels.weight_kl(*(tensor.to(kernel_device) for tensor in parameter), config=config)
    assert_kl_close(kl, ops.weight_kl(*(tensor.double() for tensor in parameter)), weights=17 * 21)


def test_16_bit_parameters_have_their_kl_in_fp32(kernel_device: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        parameter = make_parameter((17, 21), dtype, "per-weight")
        kl = kernels.weight_kl(*(tensor.to(kernel_device) for tensor in parameter), config=TILE)
        assert_kl_close(kl, ops.weight_kl(*(tensor.double() for tensor in parameter)), weights=17 * 21)


@pytest.mark.parametrize("rho", EXTREME_RHO)
def test_extreme_rho(kernel_device: str, rho: float) -> None:
    parameter = torch.tensor([[0.5]]), torch.tensor([[rho]]), torch.tensor(0.0), torch.tensor(0.1)
    moved = [tensor.to(kernel_device) for tensor in parameter]
    noise = torch.tensor(1), None, Address()
    moved_noise = noise[0].to(kernel_device), *noise[1:]
    weight, kl = kernels.sample_weight(*moved, *moved_noise, torch.float32, True)
    exact = [tensor.double() for tensor in parameter]
    expected, expected_kl = ops.sample_weight(*exact, *noise, torch.float64, True)
    # The noise is right to 1e-5; mu + sigma eps is rounded once.
    atol = 1e-5 * reference.sigma_from_rho(exact[1]).item()
    torch.testing.assert_close(weight.cpu().double(), expected, rtol=2.0**-23, atol=atol)
    # Terms of order 100: four roundings, and sigma's own error, which exp makes 88 times that of rho.
    torch.testing.assert_close(kl.cpu().double(), expected_kl, rtol=2.0**-21, atol=100 * 2.0**-23)
    x = torch.ones(1, 1, device=kernel_device)
    _, linear_kl, _ = kernels.bayes_linear(x, *moved, *(None,) * 4, *moved_noise, Address(), 1, False, "shared", True)
    torch.testing.assert_close(linear_kl.cpu().double(), expected_kl, rtol=2.0**-21, atol=100 * 2.0**-23)


@pytest.mark.parametrize("prior", ["scalar", "per-weight"])
def test_the_kl_of_a_posterior_that_is_the_prior(kernel_device: str, prior: str) -> None:
    """The difference of sums that cancel: each weight's terms are a few roundings from 0, not from their size."""
    N, K = 16, 512
    rho = torch.full((N, K), -2.0)
    sigma = reference.sigma_from_rho(rho.double()).float()
    parameter = rho.new_full((N, K), 0.3), rho, torch.tensor(0.3), sigma if prior == "per-weight" else sigma[0, 0]
    moved = [tensor.to(kernel_device) for tensor in parameter]
    seed, bias = torch.tensor(1, device=kernel_device), (None,) * 4
    x = torch.ones(3, K, device=kernel_device)
    how = seed, None, Address(), Address(), 1, False, "shared", True
    _, product, _ = kernels.bayes_linear(x, *moved, *bias, *how, config=SINGLE_PASS)
    for kl in (kernels.weight_kl(*moved), product):
        # sigma is off by 2^-20, relatively; the KL's logarithm and its square by as much.
        assert abs(kl.item()) < 2 * 2.0**-20 * N * K


def test_nan_is_not_hidden(kernel_device: str) -> None:
    """sigma's floor takes the larger of two numbers, of which one is none."""
    rho = torch.full((16, 16), math.nan, device=kernel_device)
    prior = torch.zeros((), device=kernel_device), torch.ones((), device=kernel_device)
    seed = torch.tensor(1, device=kernel_device)
    weight, kl = kernels.sample_weight(torch.zeros_like(rho), rho, *prior, seed, None, Address(), torch.float32, True)
    assert weight.isnan().all()
    assert kl.isnan()

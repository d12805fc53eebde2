"""Backward kernels, interpreted or compiled, against the operators in PyTorch at double precision."""

from dataclasses import replace

import pytest
import torch
from problems import (
    DTYPES,
    EXTREME_RHO,
    PRIORS,
    Problem,
    assert_close,
    check_input_gradient,
    check_weight_gradients,
    make_problem,
)
from torch import Tensor

from fusedbayes import kernels
from fusedbayes.kernels import MatmulConfig, TileConfig
from fusedbayes.noise import Address

ops = torch.ops.fusedbayes

# Small enough that (33, 37, 44) takes several tiles along every axis, with a ragged last one.
TILE = TileConfig(block_n=16, block_k=16)
SINGLE_PASS = MatmulConfig(16, 16, 16)
SPLIT = replace(SINGLE_PASS, splits=2)
SAMPLE_ONCE = replace(SINGLE_PASS, single_pass=False)
SHAPES = pytest.mark.parametrize("shape", [(33, 37, 44), (1, 21, 36), (33, 5, 7), (3, 1, 1), (0, 5, 3)], ids=str)


@pytest.mark.parametrize(
    "config", [SINGLE_PASS, SPLIT, SAMPLE_ONCE, None], ids=["single-pass", "split", "sample-once", "selected"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
def test_gradient_of_the_input(
    kernel_device: str, shape: tuple[int, int, int], dtype: torch.dtype, config: MatmulConfig | None
) -> None:
    check_input_gradient(make_problem(shape, dtype=dtype), config, kernel_device)


@pytest.mark.parametrize("config", [SINGLE_PASS, None], ids=["small-tiles", "selected"])
@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
def test_gradients_of_the_weight(
    kernel_device: str, shape: tuple[int, int, int], dtype: torch.dtype, config: MatmulConfig | None
) -> None:
    check_weight_gradients(make_problem(shape, dtype=dtype), config, kernel_device)


@pytest.mark.parametrize("prior", PRIORS)
def test_priors_in_the_gradients_of_the_weight(kernel_device: str, prior: str) -> None:
    check_weight_gradients(make_problem((5, 18, 20), prior=prior), SINGLE_PASS, kernel_device)


def test_gradients_of_the_weight_when_the_kl_is_not_used(kernel_device: str) -> None:
    problem = make_problem((5, 18, 20), prior="per-weight")._replace(grad_kl=None)
    check_weight_gradients(problem, SINGLE_PASS, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gradients_of_16_bit_parameters(kernel_device: str, dtype: torch.dtype) -> None:
    problem = make_problem((5, 18, 20), dtype=dtype, parameter_dtype=dtype, prior="per-weight")
    check_weight_gradients(problem, SINGLE_PASS, kernel_device)
    check_input_gradient(problem, SINGLE_PASS, kernel_device)


@pytest.mark.parametrize(
    ("prior", "used"),
    [("none", "weight"), *((prior, used) for prior in PRIORS[1:] for used in ("weight", "kl", "both"))],
)
@pytest.mark.parametrize("config", [TILE, None], ids=["small-tiles", "selected"])
def test_gradients_of_sample_weight(kernel_device: str, config: TileConfig | None, prior: str, used: str) -> None:
    problem = make_problem((1, 17, 21), prior=prior)
    grad_weight = None if used == "kl" else torch.randn(17, 21)
    grad_kl = None if used == "weight" else problem.grad_kl
    check_sample_gradients(problem, grad_weight, grad_kl, config, kernel_device)


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_the_gradients_of_sample_weight(
    kernel_device: str, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    problem = make_problem((1, 17, 21), parameter_dtype=parameter_dtype)
    check_sample_gradients(problem, torch.randn(17, 21, dtype=dtype), problem.grad_kl, TILE, kernel_device)


def check_sample_gradients(
    problem: Problem, grad_weight: Tensor | None, grad_kl: Tensor | None, config: TileConfig | None, device: str
) -> None:
    cotangents, moved = (grad_weight, grad_kl), problem.to(device)
    gradients = kernels.sample_weight_backward(
        *(None if c is None else c.to(device) for c in cotangents),
        *moved.weight,
        # Where the sample was not used there is no noise to draw again, hence no need of a seed.
        *((None, None) if grad_weight is None else (moved.seed, moved.sample)),
        problem.weight_address,
        config=config,
    )
    expected = ops.sample_weight_backward(
        *(None if c is None else c.double() for c in cotangents),
        *problem.exact().weight,
        *problem.noise,
    )
    for gradient, exact in zip(gradients, expected, strict=True):
        assert gradient.dtype == problem.weight[0].dtype
        assert_close(gradient, exact, terms=1, operands=torch.float32)


@pytest.mark.parametrize("grad_kl", [0.3, 65536.0], ids=["ordinary", "scaled"])
def test_gradients_at_extreme_rho(kernel_device: str, grad_kl: float) -> None:
    """Neither where sigma underflows nor with the loss scale of half precision does 1 / sigma overflow."""
    K = len(EXTREME_RHO)
    parameter = torch.full((1, K), 0.5), torch.tensor([EXTREME_RHO]), torch.tensor(0.0), torch.tensor(0.1)
    cotangents = torch.ones(1, K), torch.tensor(grad_kl)
    seed = torch.tensor(1)
    gradients = kernels.sample_weight_backward(
        *(tensor.to(kernel_device) for tensor in (*cotangents, *parameter, seed)), None, Address()
    )
    expected = ops.sample_weight_backward(
        *(tensor.double() for tensor in (*cotangents, *parameter)), seed, None, Address()
    )
    for gradient, exact in zip(gradients, expected, strict=True):
        # The KL's part relatively: sigma's error is 88 times that of rho, or less; the noise's part is right to 1e-5.
        torch.testing.assert_close(gradient.cpu().double(), exact, rtol=100 * 2.0**-23, atol=2e-5)

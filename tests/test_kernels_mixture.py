"""The kernels of the scale mixture, in C++ on every instruction set and in Triton, against double precision."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import EXTREME_RHO, MIXTURE, check_scale_mixture

from fusedbayes import kernels
from fusedbayes.kernels import TileConfig, cpu
from fusedbayes.kernels.cpu import native
from fusedbayes.noise import Address

LIBRARY = native.load()
INSTRUCTION_SETS = (
    ()
    if isinstance(LIBRARY, str)
    else native.INSTRUCTION_SETS[: native.INSTRUCTION_SETS.index(LIBRARY.instruction_set) + 1]
)
KEY = torch.tensor(2**40 + 7), torch.tensor(3), Address(8, 5, 0)
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.fixture(
    params=[
        *INSTRUCTION_SETS,
        pytest.param("interpreter", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here")),
        pytest.param("compiled", marks=pytest.mark.gpu),
    ]
)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """Launchers, and the device that they run on."""
    if request.param in INSTRUCTION_SETS:
        monkeypatch.setattr(native, "load", lambda: replace(LIBRARY, instruction_set=request.param))
        return cpu, "cpu"
    return kernels, "cuda" if request.param == "compiled" else "cpu"


def parameter(*shape: int, dtype: torch.dtype = torch.float32, rho: float = -2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the weights are narrow, half of them wide."""
    return torch.randn(shape, dtype=dtype) * (torch.rand(shape) < 0.5), torch.randn(shape, dtype=dtype) + rho


@pytest.mark.parametrize("dtype", DTYPES)
# Whole groups and whole tiles, rests of both, whole quads and none, single elements, nothing.
@pytest.mark.parametrize("shape", [(3, 64), (5, 36), (3, 37), (2, 131), (1, 1), (0, 5), (3, 0)], ids=str)
def test_sizes(where: tuple[Any, str], shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_scale_mixture(*parameter(*shape, dtype=dtype), MIXTURE, KEY, *where)


@pytest.mark.parametrize(
    "mixture",
    [(0.5, 0.0625, 0.75), (0.25, 1.0, 2.0**-9), (0.5, 0.25, 0.25), (1.0 - 2.0**-20, 1.0, 0.25), (2.0**-20, 1.0, 0.25)],
    ids=str,
)
@pytest.mark.parametrize("rho", [-2.0, -6.0], ids=["wide", "narrow"])
def test_mixtures(where: tuple[Any, str], mixture: Sequence[float], rho: float) -> None:
    check_scale_mixture(*parameter(5, 36, rho=rho), mixture, KEY, *where)


@pytest.mark.parametrize("key", [(KEY[0], None, Address(8, 2**31, 3)), (-KEY[0], KEY[1], Address(9, 0, 2**33 - 6))])
def test_noise_of_a_shard(where: tuple[Any, str], key: Any) -> None:
    check_scale_mixture(*parameter(3, 36), MIXTURE, key, *where)


def test_a_permuted_parameter(where: tuple[Any, str]) -> None:
    mu, rho = (tensor.t() for tensor in parameter(36, 5))
    check_scale_mixture(mu, rho, MIXTURE, KEY, *where)


def test_several_tiles(where: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    if where[0] is kernels:
        monkeypatch.setattr("fusedbayes.kernels.mixture.select_tile_config", lambda shape: TileConfig(2, 16))
    check_scale_mixture(*parameter(5, 36), MIXTURE, KEY, *where)


@pytest.mark.parametrize("narrow", [1e-6, 1e-3])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-7, 1e-6, 5e-6, 8e-6, 1e-4, 4e-3, 1.0, 30.0, 1e4])
def test_both_densities_may_underflow(where: tuple[Any, str], magnitude: float, narrow: float) -> None:
    mu = torch.tensor([[magnitude, -magnitude]])
    for rho in (-20.0, -13.0):
        check_scale_mixture(mu, torch.full_like(mu, rho), (0.5, 1.0, narrow), KEY, *where)


@pytest.mark.parametrize("rho", EXTREME_RHO)
def test_extreme_rho(where: tuple[Any, str], rho: float) -> None:
    launchers, device = where
    mu = torch.full((1, 4), 0.5)
    arguments = mu, torch.full_like(mu, rho), *(torch.tensor(number) for number in MIXTURE)
    given = [tensor.to(device) for tensor in (*arguments, *KEY[:2])]
    kl = launchers.scale_mixture_kl(*given, KEY[2]).cpu().double()
    expected = torch.ops.fusedbayes.scale_mixture_kl(*(tensor.double() for tensor in arguments), *KEY)
    # Of a large sigma the noise, off by 1e-5, comes in squared.
    torch.testing.assert_close(kl, expected, rtol=4e-5, atol=4 * 100 * 2.0**-23)
    one = torch.ones(())
    grads = launchers.scale_mixture_kl_backward(one.to(device), *given, KEY[2])
    exact = torch.ops.fusedbayes.scale_mixture_kl_backward(
        one.double(), *(tensor.double() for tensor in arguments), *KEY
    )
    for grad, exact_grad in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad.cpu().double(), exact_grad, rtol=4e-5, atol=4e-5)


@pytest.mark.parametrize("pi", [0.0, 1.0])
@pytest.mark.parametrize("sigmas", [(0.75, 0.0625), (0.0625, 0.75)], ids=str)
def test_a_share_of_everything(where: tuple[Any, str], sigmas: tuple[float, float], pi: float) -> None:
    """Which pi may be rounded to in 16 bits."""
    launchers, device = where
    only = torch.tensor(sigmas[0] if pi == 1.0 else sigmas[1])
    weight = parameter(3, 36)
    results = []
    for mixture in ((torch.tensor(pi), *map(torch.tensor, sigmas)), (torch.tensor(0.5), only, only)):
        given = [tensor.to(device) for tensor in (*weight, *mixture, *KEY[:2])]
        results.append(launchers.scale_mixture_kl(*given, KEY[2]))
    assert results[0].isfinite()
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", [0, 1, 2, 3, 4])
def test_what_is_not_finite_is_not_hidden(where: tuple[Any, str], part: int, value: float) -> None:
    launchers, device = where
    if part == 2 and value == math.inf:
        pytest.skip("a share that is infinite is none")
    arguments = [*parameter(3, 37), *(torch.tensor(number) for number in MIXTURE)]
    arguments[part].view(-1)[-1] = value
    kl = launchers.scale_mixture_kl(*(t.to(device) for t in (*arguments, *KEY[:2])), KEY[2])
    assert not kl.isfinite()


def test_every_number_of_threads_gives_the_same_bits() -> None:
    if isinstance(LIBRARY, str):
        pytest.skip(LIBRARY)
    arguments = *parameter(77, 1091), *(torch.tensor(number) for number in MIXTURE), *KEY
    before, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            kl = cpu.scale_mixture_kl(*arguments)
            results.append((kl, *cpu.scale_mixture_kl_backward(torch.ones(()), *arguments)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_sum_of_many_weights() -> None:
    """The errors of a million weights stay a random walk: each part is centred before it is added up."""
    if isinstance(LIBRARY, str):
        pytest.skip(LIBRARY)
    check_scale_mixture(*parameter(300, 1000), MIXTURE, KEY, cpu, "cpu")

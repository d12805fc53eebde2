"""What kernels read and write: any layout, nothing out of bounds, the same weights in every tiling and shard."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from problems import (
    MIXTURE,
    Problem,
    assert_close,
    assert_kl_close,
    check_bayes_linear,
    check_input_gradient,
    check_scale_mixture,
    check_weight_gradients,
    make_problem,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusedbayes import kernels
from fusedbayes.kernels import MatmulConfig, TileConfig
from fusedbayes.noise import Address

ops = torch.ops.fusedbayes

SHAPE = (17, 19, 24)  # M, N, K: two tiles along every axis, the second ragged
TILE = TileConfig(block_n=16, block_k=16)
SINGLE_PASS = MatmulConfig(16, 16, 16)
SPLIT = replace(SINGLE_PASS, splits=2)
SAMPLE_ONCE = replace(SINGLE_PASS, single_pass=False)

# Sample, stream, row_offset, column_offset: every column offset modulo 4, integers about 2^31, and the end. Products
# are single passes where the offset is a whole number of quads.
ADDRESSES = {
    "small": (1, 0, 3, 1),
    "quads": (1, 0, 3, 8),
    "quads-across-int32": (2**31, 2**31 - 1, 2**31 - 9, 2**33 - 8),
    "across-int32": (2**31, 2**31 - 1, 2**31 - 9, 2**33 - 2),
    "end": (2**32 - 1, 2**32 - 1, 2**32 - SHAPE[1], 2**34 - 1 - SHAPE[2]),
    "column-3": (None, 5, 7, 3),
}


class Products(NamedTuple):
    """What the launchers with a matrix product return for one problem."""

    y: Tensor
    kl: Tensor
    slope: Tensor
    grad_x: Tensor
    grad_mu: Tensor
    grad_rho: Tensor
    grad_bias_mu: Tensor
    grad_bias_rho: Tensor


class Samples(NamedTuple):
    """What the elementwise launchers of Gaussian priors return for one problem."""

    weight: Tensor
    kl: Tensor
    kl_alone: Tensor
    grad_mu: Tensor
    grad_rho: Tensor


def run_products(problem: Problem, config: MatmulConfig = SINGLE_PASS) -> Products:
    return Products(
        *kernels.bayes_linear(*problem.forward, config=config),
        *kernels.bayes_linear_backward(*problem.backward, config=config),
    )


def run_samples(problem: Problem) -> Samples:
    grad_weight = (problem.x.t() @ problem.grad_y).t()  # not contiguous
    return Samples(
        *kernels.sample_weight(*problem.sample_weight(torch.float32), config=TILE),
        kernels.weight_kl(*problem.weight, config=TILE),
        *kernels.sample_weight_backward(grad_weight, problem.grad_kl, *problem.weight, *problem.noise, config=TILE),
    )


def run_mixture(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """KL, dmu and drho."""
    return (
        kernels.scale_mixture_kl(*problem.scale_mixture_kl, config=TILE),
        *kernels.scale_mixture_kl_backward(*problem.scale_mixture_kl_backward, config=TILE),
    )


def run_noise(problem: Problem) -> Tensor:
    rows = torch.arange(SHAPE[1], device=problem.x.device)
    return kernels.normal(rows, SHAPE[2] - 1, *problem.noise, torch.float32, config=TILE)


def run_all(problem: Problem) -> tuple[Tensor, ...]:
    return *run_products(problem), *run_samples(problem), *run_mixture(problem)


def check_products(problem: Problem, device: str) -> None:
    """Compares the launchers with a matrix product with PyTorch in double precision."""
    check_bayes_linear(problem, SINGLE_PASS, device)
    check_input_gradient(problem, SINGLE_PASS, device)
    check_weight_gradients(problem, SINGLE_PASS, device)


def check_all(problem: Problem, device: str) -> None:
    """Likewise every launcher."""
    check_products(problem, device)
    actual, exact, (N, K) = run_samples(problem.to(device)), problem.exact(), problem.weight[0].shape
    weight, kl = ops.sample_weight(*exact.sample_weight(torch.float64))
    assert_close(actual.weight, weight, terms=1, operands=torch.float32)
    assert_kl_close(actual.kl, kl, weights=N * K)
    assert_kl_close(actual.kl_alone, kl, weights=N * K)
    gradients = ops.bayes_linear_backward(*exact.backward)[1:3]
    for gradient, exact_gradient in zip((actual.grad_mu, actual.grad_rho), gradients, strict=True):
        assert_close(gradient, exact_gradient, terms=problem.x.shape[0], operands=torch.float32)
    check_scale_mixture(*problem.weight[:2], MIXTURE, problem.noise, kernels, device)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def strided(tensor: Tensor) -> Tensor:
    rows, columns = tensor.shape
    spread = torch.full((2 * rows, 3 * columns), math.nan, dtype=tensor.dtype, device=tensor.device)
    spread[::2, 1::3] = tensor
    return spread[::2, 1::3]


def repeated_row(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


def repeated_element(tensor: Tensor) -> Tensor:
    return tensor[:1, :1].expand(tensor.shape)


class GuardedAllocations(TorchFunctionMode):
    """Gives every `new_empty` a border on both sides, which `check` finds untouched or not."""

    BORDER, SENTINEL = 4096, 123.0  # wider than a tile; a power of two keeps the pointer's alignment

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.new_empty or result.numel() == 0:
            return result
        buffer, inner = bordered(result, self.BORDER, self.SENTINEL)
        self.buffers.append(buffer)
        return inner

    def check(self) -> None:
        assert self.buffers
        for buffer in self.buffers:
            assert (buffer[: self.BORDER] == self.SENTINEL).all()
            assert (buffer[-self.BORDER :] == self.SENTINEL).all()


def bordered(tensor: Tensor, border: int, value: float) -> tuple[Tensor, Tensor]:
    """A buffer with a copy of `tensor` in the middle, and that copy."""
    buffer = torch.full((tensor.numel() + 2 * border,), value, dtype=tensor.dtype, device=tensor.device)
    inner = buffer[border : border + tensor.numel()].view(tensor.shape)
    return buffer, inner.copy_(tensor)


@pytest.mark.parametrize("column_offset", [0, 3])
def test_nothing_out_of_bounds(kernel_device: str, column_offset: int) -> None:
    """Writes would show in the border of an output; reads in a result, as NaN; and inputs stay as they were."""
    problem = make_problem(SHAPE, weight_address=Address(8, column_offset=column_offset)).to(kernel_device)
    bordered_inputs = problem.map(lambda tensor: bordered(tensor, GuardedAllocations.BORDER, math.nan)[1])
    with GuardedAllocations() as guard:
        results = *run_all(bordered_inputs), run_noise(problem)
    guard.check()
    expected = *run_all(problem), run_noise(problem)
    for result, whole in zip(results, expected, strict=True):
        assert torch.equal(result, whole)
    for tensor, before in zip(bordered_inputs.forward, problem.forward, strict=True):
        assert not isinstance(tensor, Tensor) or torch.equal(tensor, before)


@pytest.mark.parametrize("layout", [transposed, strided, repeated_row, repeated_element])
def test_layout_of_the_activations(kernel_device: str, layout: Callable[[Tensor], Tensor]) -> None:
    problem = make_problem(SHAPE).to(kernel_device)
    problem = problem._replace(x=layout(problem.x), grad_y=layout(problem.grad_y))
    assert problem.x.stride() != (SHAPE[2], 1)
    check_products(problem, kernel_device)


@pytest.mark.parametrize("layout", [transposed, strided, repeated_row])
def test_layout_of_the_parameters_and_priors(kernel_device: str, layout: Callable[[Tensor], Tensor]) -> None:
    problem = make_problem(SHAPE, prior="per-weight").to(kernel_device)
    weight = tuple(layout(tensor) for tensor in problem.weight)
    check_all(problem._replace(weight=weight), kernel_device)


@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES.keys())
def test_addresses(kernel_device: str, address: tuple[int | None, int, int, int]) -> None:
    sample, *weight = address
    weight_address = Address(*weight)
    # SHAPE has fewer outputs than inputs: the bias fits where the weight's columns do.
    bias_address = Address(weight_address.stream ^ 1, column_offset=weight_address.column_offset)
    problem = make_problem(SHAPE, sample=sample, weight_address=weight_address, bias_address=bias_address)
    check_all(problem, kernel_device)


def test_the_bias_of_a_shard_across_column_2_31(kernel_device: str) -> None:
    problem = make_problem(SHAPE, bias_address=Address(9, column_offset=2**31 - 5))
    for config in (SINGLE_PASS, SAMPLE_ONCE):
        check_bayes_linear(problem, config, kernel_device)
        check_weight_gradients(problem, config, kernel_device)


@pytest.mark.parametrize("name", ["x", "grad_y"])
def test_rows_far_apart(kernel_device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like the last tokens of long sequences: offsets within a tile of rows do not fit 32 bits."""
    problem = make_problem((9, 16, 16), bias=False, dtype=torch.float16).to(kernel_device)
    rows = getattr(problem, name)
    # Virtual memory, of which only the rows' pages are touched.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(9 * 2**28, dtype=rows.dtype, device=kernel_device).as_strided(rows.shape, (2**28, 1))
    problem = problem._replace(**{name: far.copy_(rows)})
    check_products(problem, kernel_device)


RUNS = {
    "single-pass": run_products,
    "split": partial(run_products, config=SPLIT),
    "sample-once": partial(run_products, config=SAMPLE_ONCE),
    "elementwise": run_samples,
    "mixture": run_mixture,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_run_repeats_bit_for_bit(kernel_device: str, run: Callable[[Problem], tuple[Tensor, ...]]) -> None:
    problem = make_problem(SHAPE).to(kernel_device)
    first, second = run(problem), run(problem)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def weights_multiplied(problem: Problem, config: MatmulConfig | None) -> tuple[Tensor, Tensor]:
    """The weights that the forward and the backward kernel multiply by, shown by identity matrices."""
    (N, K), device = problem.weight[0].shape, problem.x.device
    forward = problem._replace(x=torch.eye(K, device=device), bias=(None,) * 4).forward
    backward = problem._replace(grad_y=torch.eye(N, device=device), x=torch.zeros(N, K, device=device)).backward_input
    return (
        kernels.bayes_linear(*forward, config=config)[0].t(),
        kernels.bayes_linear_backward(*backward, config=config)[0],
    )


@pytest.mark.parametrize("address", [Address(8), Address(8, 5, 4), Address(8, 5, 3)], ids=["origin", "quads", "shard"])
def test_weights_do_not_depend_on_the_configuration(kernel_device: str, address: Address) -> None:
    problem = make_problem(SHAPE, prior="none", weight_address=address).to(kernel_device)
    arguments = problem.sample_weight(torch.float32)
    tiles = (TILE, TileConfig(8, 64), TileConfig(32, 4), None)  # of single rows, the one that is selected
    sampled, *others = (kernels.sample_weight(*arguments, config=tile)[0] for tile in tiles)
    for other in others:
        assert torch.equal(sampled, other)
    configs = (SINGLE_PASS, SPLIT, MatmulConfig(32, 16, 64), MatmulConfig(16, 32, 16), SAMPLE_ONCE, None)
    if address.column_offset % 4 != 0:
        configs = (SINGLE_PASS,)  # two passes whatever the configuration, which these do not take
    for config in configs:
        for weight in weights_multiplied(problem, config):
            # Two kernels may or may not contract mu + sigma eps to one rounding.
            torch.testing.assert_close(weight, sampled, rtol=2.0**-22, atol=2.0**-22)


class Drawn(NamedTuple):
    """What shows the weights of a problem without bias, and their gradients by the two kinds of launchers."""

    weights: tuple[Tensor, Tensor, Tensor]
    gradients: tuple[Tensor, Tensor, Tensor, Tensor]


def draw(problem: Problem) -> Drawn:
    sampled, _ = kernels.sample_weight(*problem.sample_weight(torch.float32), config=TILE)
    _, *by_product = kernels.bayes_linear_backward(*problem.backward_weight, config=SINGLE_PASS)[:3]
    grad_weight = problem.grad_y.t() @ problem.x
    elementwise = kernels.sample_weight_backward(
        grad_weight, problem.grad_kl, *problem.weight, *problem.noise, config=TILE
    )
    return Drawn((*weights_multiplied(problem, SINGLE_PASS), sampled), (*by_product, *elementwise))


@cache
def whole_layer(device: str) -> tuple[Problem, Drawn]:
    whole = make_problem(SHAPE, prior="per-weight", bias=False).to(device)
    return whole, draw(whole)


@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 16), (0, 24)), ((3, 19), (4, 24)), ((9, 19), (5, 24)), ((3, 4), (1, 15))]
)
def test_a_shard_is_its_part_of_the_whole(kernel_device: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    whole, (all_weights, all_gradients) = whole_layer(kernel_device)
    part = slice(*rows), slice(*columns)
    shard = whole._replace(
        x=whole.x[:, part[1]],
        weight=tuple(tensor[part] for tensor in whole.weight),
        weight_address=Address(8, rows[0], columns[0]),
        grad_y=whole.grad_y[:, part[0]],
    )
    weights, gradients = draw(shard)
    for weight, all_of_them in zip(weights, all_weights, strict=True):
        assert torch.equal(weight, all_of_them[part])
    for gradient, all_of_them in zip(gradients, all_gradients, strict=True):
        # The same sums over the batch, perhaps in another order.
        tolerance = {"rtol": 2.0**-22, "atol": 2.0**-22 * SHAPE[0] ** 0.5}
        torch.testing.assert_close(gradient, all_of_them[part], **tolerance)

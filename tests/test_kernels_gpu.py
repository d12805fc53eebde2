"""What only a GPU shows: large shapes, more than 2^31 elements, CUDA graphs, no waiting for the device."""

import math
from collections.abc import Callable

import pytest
import torch
from problems import (
    DTYPES,
    PRIORS,
    assert_close,
    check_bayes_linear,
    check_input_gradient,
    check_weight_gradients,
    make_problem,
)
from torch import Tensor

from fusedbayes import BayesLinear, kernels, reference
from fusedbayes.kernels import MatmulConfig
from fusedbayes.noise import Address

pytestmark = pytest.mark.gpu

ops = torch.ops.fusedbayes
GIB = 2**30


@pytest.mark.parametrize("single_pass", [True, False], ids=["single-pass", "sample-once"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 1000, 1024), (300, 777, 515), (1, 2048, 4099)], ids=str)
def test_large_shapes(shape: tuple[int, int, int], dtype: torch.dtype, single_pass: bool) -> None:
    problem = make_problem(shape, dtype=dtype)
    config = MatmulConfig(64, 64, 32, num_warps=8, single_pass=single_pass)
    check_bayes_linear(problem, config, "cuda")
    check_input_gradient(problem, config, "cuda")
    check_weight_gradients(problem, None, "cuda")


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", ["bayes_linear", "sample_weight", "bayes_linear_backward"])
def test_operators_on_cuda_equal_those_on_the_cpu(name: str, prior: str) -> None:
    problem = make_problem((65, 130, 67), prior=prior)
    arguments: dict[str, Callable[..., tuple[object, ...]]] = {
        "bayes_linear": lambda p: p.forward,
        "sample_weight": lambda p: p.sample_weight(p.x.dtype),
        "bayes_linear_backward": lambda p: p.backward,
    }
    operator, call = getattr(ops, name), arguments[name]
    for actual, expected in zip(operator(*call(problem.to("cuda"))), operator(*call(problem.exact())), strict=True):
        assert actual.is_cuda
        # A KL of 1e4 is right to single precision; the other results are sums of at most 67 products.
        rtol = 1e-6 if actual.dim() == 0 else 0.0
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=rtol, atol=8e-5)


def test_double_precision_on_cuda_is_double() -> None:
    problem = make_problem((5, 18, 20), dtype=torch.float64, parameter_dtype=torch.float64)
    for actual, expected in zip(
        ops.bayes_linear(*problem.to("cuda").forward), ops.bayes_linear(*problem.forward), strict=True
    ):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-12, atol=1e-12)


def require_memory(gib: int) -> None:
    if torch.cuda.mem_get_info()[0] < gib * GIB:
        pytest.skip(f"needs {gib} GiB of GPU memory")


def test_weights_of_more_than_2_31_elements() -> None:
    """Constant parameters: what differs from weight to weight is the noise, drawn here for the last rows alone."""
    N, K = 65_539, 32_771
    assert N * K > 2**31
    require_memory(24)
    mu, rho = (torch.full((N, K), value, dtype=torch.float16, device="cuda") for value in (0.5, -1.0))
    prior = torch.tensor(0.0, device="cuda"), torch.tensor(1.0, device="cuda")
    noise, rows = (torch.tensor(3, device="cuda"), None, Address(8)), slice(N - 2, N)
    last = [mu[rows].cpu().double(), rho[rows].cpu().double()]
    last_noise = (torch.tensor(3), None, Address(8, row_offset=N - 2))
    weight, kl = kernels.sample_weight(mu, rho, *prior, *noise, torch.float16, True)
    exact_prior = (tensor.cpu().double() for tensor in prior)
    expected, expected_kl = ops.sample_weight(*last, *exact_prior, *last_noise, torch.float64, True)
    assert_close(weight[rows], expected, terms=1, operands=torch.float32)
    # The roundings of a sum of equal numbers do not average out: 2^-24 for each addition in a chain, at most 2^7 long.
    torch.testing.assert_close(kl.cpu().double() / N, expected_kl / 2, rtol=2.0**-17, atol=0)
    # The sample serves as its own cotangent.
    gradients = kernels.sample_weight_backward(weight, None, mu, rho, None, None, *noise)
    exact = ops.sample_weight_backward(weight[rows].cpu().double(), None, *last, None, None, *last_noise)
    for gradient, exact_gradient in zip(gradients, exact, strict=True):
        assert_close(gradient[rows], exact_gradient, terms=1, operands=torch.float32)


def test_activations_of_more_than_2_31_elements() -> None:
    M, N, K = 131_075, 16, 16_411
    assert M * K > 2**31
    require_memory(16)
    problem = make_problem((3, N, K), dtype=torch.float16, bias=False)
    moved = problem.to("cuda")
    x = torch.zeros(M, K, dtype=torch.float16, device="cuda")
    grad_y = torch.zeros(M, N, dtype=torch.float16, device="cuda")
    x[-3:], grad_y[-3:] = moved.x, moved.grad_y
    large = moved._replace(x=x, grad_y=grad_y)
    config = MatmulConfig(64, 16, 64)
    y, _ = kernels.bayes_linear(*large.forward, config=config)
    assert_close(y[-3:], ops.bayes_linear(*problem.exact().forward)[0], terms=K, operands=torch.float16)
    assert (y[:-3] == 0).all()
    gradients = kernels.bayes_linear_backward_weight(*large.backward_weight)
    _, *exact = ops.bayes_linear_backward(*problem.exact().backward)
    for gradient, exact_gradient in zip(gradients, exact, strict=True):
        assert_close(gradient, exact_gradient, terms=3, operands=torch.float32)
    del x, large
    grad_x = kernels.bayes_linear_backward_input(grad_y, *moved.backward_input[1:], config=config)
    expected, *_ = ops.bayes_linear_backward(*problem.exact().backward)
    assert_close(grad_x[-3:], expected, terms=N, operands=torch.float16)
    assert (grad_x[:-3] == 0).all()


def identity_step(layer: BayesLinear, x: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """For an identity x: W^T, and the gradients of x, mu and rho."""
    y = layer(x)
    return y, *torch.autograd.grad(y, (x, layer.weight_mu, layer.weight_rho), grad_y)


def test_cuda_graph_draws_fresh_noise_at_each_replay() -> None:
    layer = BayesLinear(64, 48, bias=False, device="cuda")
    x, grad_y = torch.eye(64, device="cuda", requires_grad=True), torch.randn(64, 48, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up, as capture asks
        for _ in range(3):
            identity_step(layer, x, grad_y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = identity_step(layer, x, grad_y)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append([result.detach().clone() for result in results])
    mu, rho = layer.weight_mu.detach(), layer.weight_rho.detach()
    sigma = reference.sigma_from_rho(rho)
    for y, grad_x, grad_mu, grad_rho in replays:
        weight = y.t()
        # The gradients are those of this replay's weights: eps = (W - mu) / sigma, sigma about 0.0125.
        torch.testing.assert_close(grad_x, grad_y @ weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(grad_mu, grad_y.t(), rtol=0, atol=1e-6)
        eps = (weight - mu) / sigma
        assert 0.9 < eps.std() < 1.1
        torch.testing.assert_close(grad_rho, grad_y.t() * eps * torch.sigmoid(rho), rtol=0, atol=1e-4)
    for index, (y, *_) in enumerate(replays):
        assert all(not torch.equal(y, other) for other, *_ in replays[:index])


def test_a_split_sum_repeats_on_every_stream_and_in_a_graph() -> None:
    shape = 64, 256, 4096
    assert kernels.select_config("forward", shape, torch.bfloat16, torch.cuda.get_device_capability()).splits > 1
    problem = make_problem(shape, dtype=torch.bfloat16).to("cuda")

    def run() -> tuple[Tensor, ...]:
        return kernels.bayes_linear(*problem.forward)[:2]

    expected = run()
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    for stream in 8 * streams:  # at once
        with torch.cuda.stream(stream):
            results.append(run())
    results += [run() for _ in range(8)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for result in captured:
            result.zero_()
        graph.replay()
        results.append(tuple(result.clone() for result in captured))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_training_step_does_not_wait_for_the_device() -> None:
    layer = BayesLinear(64, 48, device="cuda")
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    (layer(x).sum() + layer.kl_loss()).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        (layer(x).sum() + layer.kl_loss()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(layer.weight_rho.grad.sum().item())

"""Throughput of one linear layer, forward and backward with the KL: nn.Linear (the floor), plain PyTorch, ours.

pytest bench --benchmark-group-by=group --benchmark-columns=median,iqr,rounds
"""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedbayes as fb
from fusedbayes import reference
from fusedbayes.noise import draw_seed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Called with x; returns y and the KL.
Step = Callable[[Tensor], tuple[Tensor, Tensor]]


def timer() -> float:
    """Seconds, once the device has done what was asked of it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _nn_linear(layer: fb.BayesLinear) -> tuple[Step, nn.Module]:
    linear = nn.Linear(layer.in_features, layer.out_features, device=DEVICE)
    return lambda x: (linear(x), x.new_zeros(())), linear


def _pytorch(layer: fb.BayesLinear) -> tuple[Step, nn.Module]:
    parameters = layer.weight_mu, layer.weight_rho, layer.bias_mu, layer.bias_rho

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        y = reference.bayes_linear(x, *parameters, draw_seed(x.device))
        return y, reference.weight_kl(layer.gaussian("weight")) + reference.weight_kl(layer.gaussian("bias"))

    return step, layer


def _fusedbayes(layer: fb.BayesLinear) -> tuple[Step, nn.Module]:
    elbo = fb.ELBO(layer, lambda output, _: output.sum(), num_data=1)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        out = elbo(x, None)
        return out.nll, out.kl

    return step, layer


IMPLEMENTATIONS = {"nn.Linear": _nn_linear, "pytorch": _pytorch, "fusedbayes": _fusedbayes}


@pytest.mark.benchmark(timer=timer)
@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("width", [256, 1024])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_forward_backward(benchmark, name: str, width: int, rows: int) -> None:
    torch.manual_seed(0)
    layer = fb.BayesLinear(width, width, device=DEVICE)
    x = torch.randn(rows, width, device=DEVICE, requires_grad=True)
    step, module = IMPLEMENTATIONS[name](layer)
    inputs = [x, *module.parameters()]

    def run() -> Tensor:
        y, kl = step(x)
        torch.autograd.grad(y.sum() + kl, inputs)
        return kl

    # No number without a right answer.
    if name != "nn.Linear":
        torch.testing.assert_close(run(), fb.kl_loss(layer), rtol=1e-5, atol=0.0)
    benchmark.group = f"{width} x {width}, {rows} rows"
    benchmark(run)

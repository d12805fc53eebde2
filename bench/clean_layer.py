"""What torch.compile's clean layer has to compute for each weight that it samples, counted like our kernels.

The Triton kernels below are our reconstruction of what Inductor generates for `bench.implementations.CleanLinear` on
CUDA, not its output: the same operations, as PyTorch 2.13 has them in `torch/_inductor/codegen/triton.py`
(`TritonOverrides.randn`, `log1p`, `exp`). Without the KL that is a one-dimensional kernel, where four weights share a
Philox (`randn4x` in `torch/_inductor/runtime/triton_helpers.py`). With the KL it is a reduction, where each weight has
its own; here is one step of its loop. The operations were compared with those that Inductor's code generator writes
when it is run without a GPU; block sizes, which its autotuner would choose, are ours.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from bench import sass
from bench.launches import KernelLaunch, on_gpu, record

BLOCK, NUM_WARPS = 1024, 4
WEIGHTS = 2**24


class Cost(NamedTuple):
    """Instructions and results of the special-function unit per weight."""

    instructions: float
    special: float


@triton.jit
def _weight(mu, rho, eps):
    sigma = tl.where(rho > 20.0, rho, libdevice.log1p(libdevice.exp(rho)))
    return mu + sigma * eps, sigma


@triton.jit
def _clean_kernel(
    weight_ptr,  # (WEIGHTS,) bf16
    mu_ptr,  # (WEIGHTS,)
    rho_ptr,  # (WEIGHTS,)
    seed_ptr,  # () int64
    BLOCK: tl.constexpr,
):
    """W = mu + softplus(rho) eps. Grid: (WEIGHTS / BLOCK,)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mu, rho = tl.load(mu_ptr + offsets), tl.load(rho_ptr + offsets)
    first_quad = tl.min(offsets.to(tl.uint32), axis=0) // 4
    seed = tl.min(tl.load(seed_ptr) + offsets.to(tl.uint32) * 0, axis=0)
    z0, z1, z2, z3 = tl.randn4x(seed, first_quad + tl.arange(0, BLOCK // 4))
    eps = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK])
    weight, _ = _weight(mu, rho, eps)
    tl.store(weight_ptr + offsets, weight)


@triton.jit
def _clean_kl_kernel(
    weight_ptr,  # (WEIGHTS,) bf16
    kl_ptr,  # (WEIGHTS / BLOCK,)
    mu_ptr,  # (WEIGHTS,)
    rho_ptr,  # (WEIGHTS,)
    seed_ptr,  # () int64
    BLOCK: tl.constexpr,
):
    """Likewise, and the sum of a block's KL. Grid: (WEIGHTS / BLOCK,)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mu, rho = tl.load(mu_ptr + offsets), tl.load(rho_ptr + offsets)
    weight, sigma = _weight(mu, rho, tl.randn(tl.load(seed_ptr), offsets.to(tl.uint32)))
    kl = -4.1588830833596715 - tl.log(sigma) + (sigma * sigma + mu * mu) * 2048.0 - 0.5
    tl.store(kl_ptr + tl.program_id(0), tl.sum(kl))
    tl.store(weight_ptr + offsets, weight)


def _launch(with_kl: bool) -> None:
    weight = on_gpu(WEIGHTS, dtype=torch.bfloat16)
    inputs = on_gpu(WEIGHTS), on_gpu(WEIGHTS), on_gpu(dtype=torch.int64)
    grid, options = (WEIGHTS // BLOCK,), {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    if with_kl:
        _clean_kl_kernel[grid](weight, on_gpu(*grid), *inputs, **options)
    else:
        _clean_kernel[grid](weight, *inputs, **options)


def sampling_cost(with_kl: bool, capability: int = 90) -> Cost:
    """Of the shortest way through the code: what no argument needs, such as sines of large angles, does not count."""
    (launch,) = record(lambda: _launch(with_kl), capability)
    assert isinstance(launch, KernelLaunch)
    (code,) = sass.disassemble([launch.compile()])
    ways = sass.Flow(code).paths({0}, sass.SIGMAS)
    shortest = min(ways.values(), key=lambda counts: counts.instructions)
    share = BLOCK // (32 * NUM_WARPS)
    return Cost(shortest.instructions / share, shortest.special / share)

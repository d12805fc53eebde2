"""Every kernel compiles for every GPU generation, in the configurations that are shipped, on a machine without a GPU.

Run as a script this file compiles what the launchers launch and prints what became of it as JSON. The tests run it so,
because in their own process Triton may be interpreting.
"""

import contextlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from fusedbayes import kernels

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
MATRIX_KERNELS = {"_linear_forward_kernel", "_linear_backward_input_kernel", "_linear_backward_weight_kernel"}


class Case(NamedTuple):
    """What is launched, and for which compute capability: each kernel on each, and then what else changes its code."""

    capability: int
    dtype: torch.dtype
    shape: tuple[int, int, int] = (256, 4096, 4096)
    prior: str = "scalar"
    elementwise: bool = True


CASES = {
    "sm_80-fp16": Case(80, torch.float16),
    "sm_90-bf16": Case(90, torch.bfloat16),
    "sm_100-bf16": Case(100, torch.bfloat16),
    # Sizes that no power of two divides, in a shard that begins inside a quad, with a bias and priors per weight.
    "sm_90-fp32-ragged": Case(90, torch.float32, (200, 1001, 999), prior="per-weight"),
    "sm_90-fp16-small-batch": Case(90, torch.float16, (5, 4096, 4096), prior="none", elementwise=False),
}


class OnGpu(torch.Tensor):
    """A tensor without data that says it is on a GPU."""

    is_cuda = True


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> OnGpu:
    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnGpu)


class Devices:
    """Stands in for Triton's driver: one device per target, numbered by its compute capability."""

    capability = 0

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compiling(devices: Devices) -> Iterator[list[tuple[str, Any]]]:
    """Makes a launch on a fake CUDA tensor compile its kernel, which is added to the list with its name."""
    compiled, run = [], JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        mocked = (MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments)
        compiled.append((self.__name__, run(self, *mocked, grid=grid, warmup=True, **options)))

    triton.runtime.driver.set_active(devices)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch("torch.cuda.get_device_capability", return_value=divmod(devices.capability, 10)),
    ):
        yield compiled


def launch_everything(case: Case) -> None:
    M, N, K = case.shape
    ragged = case.prior == "per-weight"
    sample = None if case.prior == "none" else on_gpu(dtype=torch.int64)
    noise = on_gpu(dtype=torch.int64), sample, (0, 0, 3 if ragged else 0)
    x, grad_y = on_gpu(M, K, dtype=case.dtype), on_gpu(M, N, dtype=case.dtype)
    mu, rho, grad_weight = on_gpu(N, K), on_gpu(N, K), on_gpu(N, K)
    priors = {"none": (None, None), "scalar": (on_gpu(), on_gpu()), "per-weight": (on_gpu(N, K), on_gpu(N, K))}
    prior, grad_kl = priors[case.prior], None if case.prior == "none" else on_gpu()
    bias = (on_gpu(N),) * 4 if ragged else (None,) * 4
    kernels.bayes_linear(x, mu, rho, *prior, *bias, *noise, noise[-1], case.prior != "none")
    kernels.bayes_linear_backward_input(grad_y, mu, rho, *noise)
    kernels.bayes_linear_backward_weight(grad_y, grad_kl, x, mu, rho, *prior, *noise)
    if ragged:  # what only the KL needs: neither a sample nor noise
        kernels.weight_kl(mu, rho, *prior)
        kernels.sample_weight_backward(None, grad_kl, mu, rho, *prior, None, None, (0, 0, 0))
    elif case.elementwise:
        kernels.sample_weight(mu, rho, *prior, *noise, case.dtype, True)
        kernels.sample_weight_backward(grad_weight, grad_kl, mu, rho, *prior, *noise)


def compile_all() -> dict[str, dict[str, Any]]:
    """For each case and kernel its shared memory and, of 16-bit products, the tensor cores' instructions."""
    report = {}
    for name, case in CASES.items():
        devices = Devices()
        devices.capability = case.capability
        with compiling(devices) as compiled:
            launch_everything(case)
        report[name] = {kernel: {"shared": binary.metadata.shared} for kernel, binary in compiled}
        for kernel, binary in compiled:
            if kernel in MATRIX_KERNELS and case.dtype.itemsize == 2:
                instructions = set(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", binary.asm["sass"]))
                report[name][kernel]["tensor_cores"] = sorted(instructions)
    return report


def test_every_kernel_compiles_for_every_target(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)

    modules = [f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    names = {name for module in modules for name in vars(sys.modules[module]) if name.endswith("_kernel")}
    for capability in SHARED_MEMORY:
        cases = [case for case in CASES if CASES[case].capability == capability]
        assert set().union(*(report[case] for case in cases)) == names
    for name, case in CASES.items():
        for kernel, facts in report[name].items():
            assert facts["shared"] <= SHARED_MEMORY[case.capability], (name, kernel)
            if "tensor_cores" in facts:
                # Of a small batch, which is the tensor cores' M side in dX, wgmma's 64 rows would mostly be padding.
                small = case.shape[0] < 64 and kernel == "_linear_backward_input_kernel"
                assert facts["tensor_cores"] == ["HMMA" if small else TENSOR_CORES[case.capability]], (name, kernel)


if __name__ == "__main__":
    print(json.dumps(compile_all()))

"""The operators on CUDA: Triton's launchers under the operators' names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedbayes import kernels
from fusedbayes.ops import backend, eager


def implementation(name: str) -> Callable[..., Any]:
    """The CUDA implementation of operator `name`: its Triton launcher, or PyTorch where that does not serve.

    The kernels compute in float32; in double precision a right answer beats a fast one.
    """

    def run(*arguments: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        exact = any(tensor.dtype == torch.float64 for tensor in tensors) or any(a is torch.float64 for a in arguments)
        module = kernels if backend.triton_kernels() and not exact else eager
        with torch.cuda.device_of(tensors[0]):
            return getattr(module, name)(*arguments)

    return run

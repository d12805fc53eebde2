"""The operators on CUDA: Triton's launchers under the operators' names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedbayes.ops import backend, eager


def implementation(name: str) -> Callable[..., Any]:
    """The CUDA implementation of operator `name`: its Triton launcher, or PyTorch for float64 parameters.

    The kernels compute in float32; in double precision a right answer beats a fast one.
    """

    def run(*arguments: Any) -> Any:
        # Imported at the first CUDA call, so that the package imports where Triton has no build.
        from fusedbayes import kernels

        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        exact = backend.reference_only() or any(tensor.dtype == torch.float64 for tensor in tensors)
        module = eager if exact else kernels
        with torch.cuda.device_of(tensors[0]):
            return getattr(module, name)(*arguments)

    return run

"""The operators on a CPU: the C++ kernel's launchers under the operators' names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedbayes.kernels import cpu
from fusedbayes.ops import backend, eager


def implementation(name: str) -> Callable[..., Any]:
    """The CPU implementation of operator `name`: the C++ kernel, or PyTorch where that is not built or does not serve.

    It computes in float32 and takes float32 and bfloat16.
    """

    def run(*arguments: Any) -> Any:
        served = backend.native() and all(cpu.serves(dtype) for dtype in _floating_dtypes(arguments))
        return getattr(cpu if served else eager, name)(*arguments)

    return run


def _floating_dtypes(arguments: tuple[Any, ...]) -> list[torch.dtype]:
    dtypes = [argument.dtype for argument in arguments if isinstance(argument, Tensor)]
    dtypes += [argument for argument in arguments if isinstance(argument, torch.dtype)]
    return [dtype for dtype in dtypes if dtype != torch.int64]

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

    served, otherwise = getattr(cpu, name), getattr(eager, name)

    def run(*arguments: Any) -> Any:
        native = backend.native() and not any(_is_other(argument) for argument in arguments)
        return (served if native else otherwise)(*arguments)

    return run


def _is_other(argument: Any) -> bool:
    dtype = argument.dtype if isinstance(argument, Tensor) else argument
    return isinstance(dtype, torch.dtype) and dtype not in cpu.DTYPES

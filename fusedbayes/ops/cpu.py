"""The operators on a CPU: the C++ kernel's launchers under the operators' names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedbayes.kernels import cpu
from fusedbayes.noise import Address
from fusedbayes.ops import backend, eager

_PLAIN = (type(None), bool, int, list, tuple, Address)


def implementation(name: str) -> Callable[..., Any]:
    """The CPU implementation of operator `name`: the C++ kernel, or PyTorch where that is not built or does not serve.

    It computes in float32 and takes float32 and bfloat16.
    """
    native, otherwise = getattr(cpu, name), getattr(eager, name)

    def run(*arguments: Any) -> Any:
        return (native if backend.cpu_kernel() and _served(arguments) else otherwise)(*arguments)

    return run


def _served(arguments: tuple[Any, ...]) -> bool:
    """Whether all tensors, and the dtype that is asked for, are what the kernel takes; no subclasses."""
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:  # isinstance costs microseconds for these
            dtype = argument.dtype
        elif kind is torch.dtype:
            dtype = argument
        elif kind in _PLAIN:
            continue
        else:
            return False
        if dtype not in cpu.DTYPES:
            return False
    return True

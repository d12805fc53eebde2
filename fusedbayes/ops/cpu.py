"""The operators on a CPU: the C++ kernel's launchers under the operators' names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fusedbayes.kernels import cpu
from fusedbayes.ops import backend, eager


def _dispatch_keys(inference: bool) -> torch._C.DispatchKeySet:
    with torch.inference_mode(inference):
        return torch._C._dispatch_keys(torch.empty(0, device="cpu"))


# What the dispatcher knows of an ordinary tensor on the CPU, and of one from inference mode.
_ORDINARY = _dispatch_keys(False), _dispatch_keys(True)


def is_next(arguments: tuple[Any, ...]) -> bool:
    """Whether all that the dispatcher does below autograd is to call the CPU implementation, and nobody looks on.

    Its way there and back, through boxes for every argument, takes as long as a small layer.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            if torch._C._dispatch_keys(argument) not in _ORDINARY:
                return False
        elif isinstance(argument, Tensor):
            return False
    return True


def implementation(name: str) -> Callable[..., Any]:
    """The CPU implementation of operator `name`: the C++ kernel, or PyTorch where that is not built or does not serve.

    It computes in float32 and takes float32 and bfloat16.
    """
    native, otherwise = getattr(cpu, name), getattr(eager, name)

    def run(*arguments: Any) -> Any:
        return (native if backend.cpu_kernel() and _served(arguments) else otherwise)(*arguments)

    return run


def _served(arguments: tuple[Any, ...]) -> bool:
    """Whether the floating tensors, and the dtype that is asked for, have dtypes that the kernel takes."""
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter or isinstance(argument, Tensor):  # isinstance alone is slow for these
            dtype = argument.dtype
        elif kind is torch.dtype:
            dtype = argument
        else:
            continue
        if dtype not in cpu.DTYPES and dtype is not torch.int64:  # seed and sample
            return False
    return True

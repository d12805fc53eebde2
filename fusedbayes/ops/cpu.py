"""The operators on a CPU: the C++ kernel's launchers under the operators' names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch.nn import Parameter

from fusedbayes.kernels import cpu
from fusedbayes.ops import backend, eager


def _dispatch_keys(inference: bool) -> _C.DispatchKeySet:
    with torch.inference_mode(inference):
        return _C._dispatch_keys(torch.empty(0, device="cpu"))


# What the dispatcher knows of an ordinary tensor on the CPU, and of one from inference mode.
_ORDINARY = _dispatch_keys(False), _dispatch_keys(True)
# What the C++ kernel serves; integers are the seed and the sample.
_SERVED = cpu.DTYPES | {torch.int64}


def served(arguments: tuple[Any, ...]) -> bool | None:
    """Whether the C++ kernel takes these arguments; None if the dispatcher does more with them than to call it.

    Or would tell somebody who looks on. The dispatcher's way there and back, through boxes for every argument, takes as
    long as a small layer.
    """
    if (
        torch.compiler.is_compiling()
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._autograd._profiler_enabled()
    ):
        return None
    is_served = True
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            if _C._dispatch_keys(argument) not in _ORDINARY:
                return None
            is_served = is_served and argument.dtype in _SERVED
        elif kind is torch.dtype:
            is_served = is_served and argument in _SERVED
        elif isinstance(argument, Tensor):
            return None
    return is_served


def direct(name: str, is_served: bool | None) -> Callable[..., Any]:
    """Who computes the operator below autograd, for what `served` said of its arguments."""
    return getattr(torch.ops.fusedbayes, name).default if is_served is None else _choice(name, is_served)


def implementation(name: str) -> Callable[..., Any]:
    """The CPU implementation of operator `name`: the C++ kernel, or PyTorch where that is not built or does not serve.

    It computes in float32 and takes float32 and bfloat16.
    """

    def run(*arguments: Any) -> Any:
        dtypes = {a.dtype if isinstance(a, Tensor) else a for a in arguments if isinstance(a, (Tensor, torch.dtype))}
        return _choice(name, dtypes <= _SERVED)(*arguments)

    return run


def _choice(name: str, is_served: bool) -> Callable[..., Any]:
    """Who computes, as the kernel takes the dtypes or not."""
    return getattr(cpu if is_served and backend.cpu_kernel() else eager, name)

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


def direct(name: str, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The operator's CPU implementation if all that the dispatcher does below autograd is to call it.

    Its way there and back, through boxes for every argument, takes as long as a small layer. None if it does more, or
    somebody looks on.
    """
    if (
        torch.compiler.is_compiling()
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._autograd._profiler_enabled()
    ):
        return None
    served = True
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            if _C._dispatch_keys(argument) not in _ORDINARY:
                return None
            served = served and argument.dtype in _SERVED
        elif kind is torch.dtype:
            served = served and argument in _SERVED
        elif isinstance(argument, Tensor):
            return None
    return _choice(name, served)


def implementation(name: str) -> Callable[..., Any]:
    """The CPU implementation of operator `name`: the C++ kernel, or PyTorch where that is not built or does not serve.

    It computes in float32 and takes float32 and bfloat16.
    """

    def run(*arguments: Any) -> Any:
        dtypes = {a.dtype if isinstance(a, Tensor) else a for a in arguments if isinstance(a, (Tensor, torch.dtype))}
        return _choice(name, dtypes <= _SERVED)(*arguments)

    return run


def _choice(name: str, served: bool) -> Callable[..., Any]:
    """Who computes, as the dtypes are served by the kernel or not."""
    return getattr(cpu if served and backend.cpu_kernel() else eager, name)

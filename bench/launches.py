"""What a GPU would be asked to run, found out and compiled without one.

Tensors without data go through the operators; each launch of a Triton kernel and each operation of PyTorch's that
follows is recorded, and a kernel's launch can be compiled. Needs a process in which Triton does not interpret.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from fusedbayes import kernels

ALLOCATIONS = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
PRODUCTS = ("mm", "addmm", "matmul")
NOISE_ALONE = "_noise_kernel"  # what an embedding looks up, or the outputs of a convolution, drawn by itself
UNUSED = {("_linear_backward_input_kernel", "shared"): ("x_ptr", "second_x_ptr")}  # arguments that it does not read


class OnGpu(torch.Tensor):
    """A tensor without data that says it is on a GPU."""

    is_cuda = True


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> OnGpu:
    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(OnGpu)


class Devices:
    """Stands in for Triton's driver: one device per target, numbered by its compute capability."""

    current = 0

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.current, 32)


_devices = Devices()
_compile_and_run = JITFunction.run


class KernelLaunch(NamedTuple):
    """A Triton kernel, and how it was called.

    Attributes:
        arguments: by name, constants included.
        options: num_warps and the like.
    """

    capability: int
    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """What it was compiled with: sizes of tiles and the like."""
        return {
            parameter.name: self.arguments[parameter.name]
            for parameter in self.function.params
            if parameter.is_constexpr
        }

    @property
    def programs(self) -> int:
        return torch.Size(self.grid).numel()

    @property
    def draws(self) -> bool:
        """Whether it draws weights, what takes their place in a product, or noise by itself, not outputs or a KL."""
        noise = self.arguments.get("seed_ptr") is not None or self.arguments.get("ESTIMATOR") == "local"
        alone = self.name == NOISE_ALONE and not self.arguments["SIGNS"]
        return noise and ("weight" in self.arguments or alone)

    @property
    def bytes(self) -> int:
        """Of all its tensors, each read or written once, also where two arguments are one tensor."""
        unused = UNUSED.get((self.name, self.arguments.get("ESTIMATOR")), ())
        leaves = tree_leaves([value for name, value in self.arguments.items() if name not in unused])
        return sum(map(_size, {id(leaf): leaf for leaf in leaves}.values()))

    def compile(self) -> Any:
        """Triton's compiled kernel, for the launch's target."""
        arguments = tree_map(_mocked, [self.arguments[name] for name in self.function.arg_names])
        with _target(self.capability):
            return _compile_and_run(self.function, *arguments, grid=self.grid, warmup=True, **self.options)


class Operation(NamedTuple):
    """One of PyTorch's own operations, or of Inductor's.

    Attributes:
        bytes: that it reads and writes.
        flop: floating-point operations of a matrix product.
        instructions, special: of all its threads, the results of the special-function unit among them, if they are
            counted.
    """

    name: str
    bytes: int
    flop: int = 0
    instructions: float = 0.0
    special: float = 0.0


@contextlib.contextmanager
def _target(capability: int) -> Iterator[None]:
    """Makes Triton's driver one whose current device has this compute capability."""
    triton.runtime.driver.set_active(_devices)
    before, _devices.current = _devices.current, capability
    try:
        yield
    finally:
        _devices.current = before


class _Recorder(TorchDispatchMode):
    """Runs our operators by their launchers, and notes every other operation that launches something."""

    def __init__(self, capability: int) -> None:
        super().__init__()
        self.capability = capability
        self.launches: list[KernelLaunch | Operation] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "fusedbayes":
            arguments = (a.as_subclass(OnGpu) if isinstance(a, Tensor) else a for a in args)
            with self:
                return getattr(kernels, operator._schema.name.split("::")[1])(*arguments)
        result = operator(*args, **(kwargs or {}))
        name = operator._schema.name.split("::")[1]
        # What an operator is to write to, it returns.
        given = {name: value for name, value in (kwargs or {}).items() if name != "out"}
        tensors = [value for value in tree_leaves((args, given, result)) if isinstance(value, Tensor)]
        # Of the operators that may return a view, a conversion to another dtype copies all the same.
        is_view = result is args[0] if name == "to" else operator.is_view
        if tensors and name not in ALLOCATIONS and not is_view:
            flop = 2 * tensors[-3].numel() * tensors[-2].shape[-1] if name in PRODUCTS else 0
            moved = sum(map(_size, tensors))
            self.launches.append(Operation(name, moved, flop))
        return result

    def launch(self, function: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        """Stands in for `JITFunction.run`."""
        *_, bind = function.device_caches[self.capability]
        bound, *_ = bind(*tree_map(_mocked, arguments), **options, debug=False, instrumentation_mode="")
        named = bound | dict(zip(function.arg_names, arguments, strict=False))
        rest = {name: value for name, value in options.items() if name not in named}
        self.launches.append(KernelLaunch(self.capability, function, named, rest, grid))


def record(run: Callable[[], object], capability: int) -> list[KernelLaunch | Operation]:
    """What `run` would launch on a GPU of this compute capability, in order."""
    recorder = _Recorder(capability)

    def launch(function: Any, *arguments: Any, **options: Any) -> None:
        recorder.launch(function, *arguments, **options)

    with (
        mock.patch.object(JITFunction, "run", launch),
        mock.patch("torch.cuda.get_device_capability", return_value=divmod(capability, 10)),
        mock.patch("torch.cuda.current_stream", return_value=SimpleNamespace(cuda_stream=0)),
        _target(capability),
        recorder,
    ):
        run()
    return recorder.launches


def _mocked(argument: Any) -> Any:
    """What Triton takes for a tensor that it is not to read."""
    return MockTensor(argument.dtype) if isinstance(argument, Tensor) else argument


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

"""Which implementation of the operators is in use, and why."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

import torch

from fusedbayes.kernels.cpu import native

_reference_only = 0
_lock = threading.Lock()


class Backend(NamedTuple):
    """What computes on a kind of device.

    Attributes:
        name: "native" (the C++ kernel), "triton", or "reference" (PyTorch).
        reason: why that one, in words.
    """

    name: str
    reason: str


@contextmanager
def use_reference() -> Iterator[None]:
    """Has PyTorch compute every operator, on every device and in every thread, as `fusedbayes.reference` defines it.

    For checking and debugging. A backward pass takes what is in use when it runs, not what its forward pass took; both
    draw the same noise.

    Example:
        >>> with fusedbayes.use_reference():
        ...     y = model(x)
    """
    global _reference_only
    with _lock:
        _reference_only += 1
    try:
        yield
    finally:
        with _lock:
            _reference_only -= 1


def backend_info() -> dict[str, Backend]:
    """Says what computes on the CPU and on CUDA, and why.

    Returns:
        A `Backend` for each of "cpu" and "cuda". Tensors of float64 are PyTorch's in any case, and float16 on the CPU.
    """
    return {"cpu": _cpu(), "cuda": _cuda()}


def reference_only() -> bool:
    """Whether `use_reference` is active."""
    return _reference_only > 0


def cpu_kernel() -> bool:
    """Whether the CPU kernel computes."""
    return not _reference_only and isinstance(native.load(), native.Library)


def triton_kernels() -> bool:
    """Whether Triton computes on CUDA."""
    return not _reference_only and _why_not_triton() is None


@functools.cache
def _why_not_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import: {error}"
    return None


def _cpu() -> Backend:
    if reference_only():
        return Backend("reference", "inside fusedbayes.use_reference()")
    library = native.load()
    if isinstance(library, str):
        return Backend("reference", library)
    threads = "of torch's OpenMP runtime" if library.parallel else "of its own"
    return Backend("native", f"{library.instruction_set}, {torch.get_num_threads()} threads {threads}")


def _cuda() -> Backend:
    if reference_only():
        return Backend("reference", "inside fusedbayes.use_reference()")
    if not torch.cuda.is_available():
        return Backend("reference", "torch sees no CUDA device")
    if (reason := _why_not_triton()) is not None:
        return Backend("reference", reason)
    return Backend("triton", f"Triton {version('triton')} on {torch.cuda.get_device_name()}")

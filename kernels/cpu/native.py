"""The compiled library: where it is, what it takes, and why it is not there if it is not."""

import contextlib
import ctypes
import functools
import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from torch.utils.dlpack import from_dlpack

FOLDER = Path(__file__).parent
SOURCES = ("fused.cpp", "pool.h", "vectors.h", "pieces.h", "passes.h", "mixture.h")
LIBRARY = "libfused.so.1"  # not a name that Python would take for a module of its own

DTYPES = frozenset((torch.float32, torch.bfloat16))  # floating dtypes that the kernel takes

# What follows mirrors fused.cpp: the passes by number, Type, and the declarations of the same names.
INSTRUCTION_SETS = ("portable", "avx2", "avx512")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 0}  # words are as wide as float32


class Output(IntEnum):
    """What a forward pass writes beside the KL."""

    NONE = 0
    WEIGHT = 1
    VARIANCE = 2
    PERTURBATION = 3  # sigma eps
    NORMAL = 4
    WORD = 5  # the bits of the noise's words
    SIGN = 6


# What passes over one parameter have in common: its rows, `Problem` of fused.cpp from `columns` to its end, packed, and
# what holds the memory that those words point to. A plain tuple: one with names takes longer to make than all of them.
Problem = tuple[int, bytes, tuple[object, ...]]

LARGE = 1 << 20  # bytes of a result whose memory is worth keeping for the next step
ABSENT: tuple[int, ...] = (0, 0, 0, 0, 0)
# A pass takes its arguments as 64-bit words in the order of the C++: a ctypes.Structure takes longer to fill than a
# small layer to compute. First those of a call, then those of a `Problem`: the parameter with its noise, and gradients.
_CALL, PARAMETER, GRADIENTS = struct.Struct("@16q"), struct.Struct("@28q"), struct.Struct("@19q")


def pointer(tensor: torch.Tensor | None) -> int:
    """Where the tensor's elements begin; 0 if there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr() or _nowhere(tensor)


def _nowhere(tensor: torch.Tensor) -> int:
    """0, where no elements are. RuntimeError if there should be some."""
    if tensor.numel():
        raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} has lost its memory: its storage was resized")
    return 0


def operand(tensor: torch.Tensor | None, first_row: int = 0) -> tuple[int, ...]:
    """The words of an `Operand` of fused.cpp: a matrix, a vector as one row, or a number that fills it."""
    if tensor is None:
        return ABSENT
    strides = tensor.stride()
    row, column = strides if len(strides) == 2 else (0, *strides) if strides else (0, 0)
    return tensor.data_ptr() or _nowhere(tensor), _TYPES[tensor.dtype], row, column, first_row


def by_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The tensor and its `operand`, or those of a copy: column by column, each element is a cache line of its own."""
    words = operand(tensor)
    if words[3] <= 1 or tensor.dim() < 2 or tensor.is_contiguous():
        return tensor, words
    tensor = tensor.contiguous()
    return tensor, operand(tensor)


@dataclass(frozen=True)
class Library:
    """The functions of fused.cpp.

    Attributes:
        instruction_set: which of INSTRUCTION_SETS they use.
        parallel: address of GOMP_parallel in the OpenMP runtime that torch uses, so that both share its threads; None
            starts threads for each call.
        new_tensor: fusedbayes_new_tensor, which holds Python's lock.
    """

    functions: ctypes.CDLL
    instruction_set: str
    parallel: int | None
    new_tensor: Callable[[int, int, object], object]

    def forward(
        self, problem: Problem, output: Output, weight: torch.Tensor | None = None, rows: slice | None = None
    ) -> float:
        """Writes `output` of these rows, or of all, into `weight`; returns the KL, 0 without a prior."""
        return self.functions.fusedbayes_forward(self._arguments(problem, output, weight, rows))

    def backward(
        self,
        problem: Problem,
        output: Output = Output.WEIGHT,
        weight: torch.Tensor | None = None,
        grad_sampled: torch.Tensor | None = None,
        rows: slice | None = None,
    ) -> None:
        """Writes the gradients of these rows, or of all, and again the forward's `output` if there is a `weight`.

        grad_sampled is dL by that output, of these rows alone.
        """
        self.functions.fusedbayes_backward(self._arguments(problem, output, weight, rows, grad_sampled))

    def new_result(self, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory for a contiguous result of this shape; if it is large, some that an earlier one has given back."""
        dtype = dtype or like.dtype
        if like.numel() * dtype.itemsize >= LARGE and dtype in DTYPES:
            shape = (ctypes.c_int64 * like.dim())(*like.shape)
            with contextlib.suppress(MemoryError):  # PyTorch may find some, or has the words for it
                return _poisoned(from_dlpack(self.new_tensor(_TYPES[dtype], like.dim(), shape)))
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)

    def _arguments(
        self,
        problem: Problem,
        output: Output,
        weight: torch.Tensor | None,
        rows: slice | None,
        grad_sampled: torch.Tensor | None = None,
    ) -> bytes:
        all_rows, words, _ = problem
        first, end = (0, all_rows) if rows is None else (rows.start, rows.stop)
        parallel, number = self.parallel or 0, INSTRUCTION_SETS.index(self.instruction_set)
        operands = *operand(weight, first), *operand(grad_sampled, first)
        return _CALL.pack(parallel, torch.get_num_threads(), number, output, first, end - first, *operands) + words


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of NaN where PyTorch would make memory of it that is not initialised."""
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # set at run time
    return tensor.fill_(math.nan) if fills and torch.are_deterministic_algorithms_enabled() else tensor


def source_hash() -> int:
    """A hash of the C++ beside this file, which is installed with it. setup.py compiles the same hash in."""
    content = b"".join((FOLDER / name).read_bytes() for name in SOURCES)
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


@functools.cache
def load() -> Library | str:
    """The library with the best instruction set of this machine, or why there is none."""
    path = FOLDER / LIBRARY
    if not path.exists():
        return "the C++ library was not built: pip install with a C++ compiler (g++ or clang++) builds it"
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the C++ library does not load: {error}"
    functions.fusedbayes_source_hash.restype = ctypes.c_uint32
    if functions.fusedbayes_source_hash() != source_hash():
        return f"{path} was built from other sources: install the package again"
    functions.fusedbayes_problem_size.restype = ctypes.c_int64
    assert functions.fusedbayes_problem_size() == _CALL.size + PARAMETER.size + GRADIENTS.size
    functions.fusedbayes_forward.restype = ctypes.c_double
    functions.fusedbayes_backward.restype = None
    functions.fusedbayes_forward.argtypes = functions.fusedbayes_backward.argtypes = [ctypes.c_char_p]
    functions.fusedbayes_instruction_set.restype = ctypes.c_int64
    try:
        # Among the symbols of the process, since torch loads its OpenMP runtime for all to see.
        parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        parallel = None
    new_tensor = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    return Library(
        functions,
        INSTRUCTION_SETS[functions.fusedbayes_instruction_set()],
        parallel,
        new_tensor(("fusedbayes_new_tensor", functions)),
    )


def library() -> Library:
    """The library; there must be one."""
    loaded = load()
    assert isinstance(loaded, Library), loaded
    return loaded

"""The compiled library: where it is, what it takes, and why it is not there if it is not."""

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
SOURCES = ("fused.cpp", "passes.h")
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
    NORMAL = 3
    WORD = 4  # the bits of the noise's words


class Operand(ctypes.Structure):
    """A matrix, or a vector as one row; one that is absent is null."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("type", "row_stride", "column_stride", "first_row")),
    )


class Problem(ctypes.Structure):
    """The arguments of a pass; what they point to is kept alive in `tensors`."""

    tensors: dict[str, torch.Tensor]
    _fields_ = (
        *((name, Operand) for name in ("weight", "grad_mu", "grad_rho")),
        *((name, Operand) for name in ("mu", "rho", "prior_mu", "prior_sigma", "grad_weight")),
        *((name, ctypes.c_void_p) for name in ("grad_kl", "seed", "sample")),
        *((name, ctypes.c_int64) for name in ("stream", "row_offset", "column_offset")),
        *((name, ctypes.c_int64) for name in ("first_row", "rows", "columns", "output", "scalar_prior")),
        ("parallel", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("threads", "instruction_set")),
    )

    def set_operands(self, tensors: dict[str, torch.Tensor | None]) -> None:
        """Points at the tensors, whatever their strides; results are contiguous."""
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        for name, tensor in self.tensors.items():
            if tensor.dim() == 2 and tensor.stride(1) > 1:
                # Column by column, each element would be a cache line of its own.
                tensor = self.tensors[name] = tensor.contiguous()
            strides = (0, 0, *tensor.stride())[-2:]
            setattr(self, name, (tensor.data_ptr(), _TYPES[tensor.dtype], *strides, 0))

    def set_grad_kl(self, grad_kl: torch.Tensor) -> None:
        """Points at the KL's cotangent, or at its copy in float32."""
        self.tensors["grad_kl"] = grad_kl.float()
        self.grad_kl = self.tensors["grad_kl"].data_ptr()

    def set_noise(self, seed: torch.Tensor, sample: torch.Tensor | None, address: Sequence[int]) -> None:
        """Points at seed and sample, and sets the address."""
        self.tensors["seed"], self.seed = seed, seed.data_ptr()
        if sample is not None:
            self.tensors["sample"], self.sample = sample, sample.data_ptr()
        self.stream, self.row_offset, self.column_offset = address

    def select(self, rows: slice, weight: torch.Tensor | None) -> None:
        """Restricts the next pass to these rows; `weight` is written for them alone."""
        self.first_row, self.rows = rows.start, rows.stop - rows.start
        if weight is not None:
            self.weight = (weight.data_ptr(), _TYPES[weight.dtype], *weight.stride(), rows.start)


@dataclass(frozen=True)
class Library:
    """The functions of fused.cpp.

    Attributes:
        instruction_set: which of INSTRUCTION_SETS they use.
        parallel: address of GOMP_parallel in the OpenMP runtime that torch uses, so that both share its threads; None
            starts threads for each call.
    """

    functions: ctypes.CDLL
    instruction_set: str
    parallel: int | None

    def forward(self, problem: Problem, output: Output) -> float:
        """Writes `output` in the place of the weight; returns the KL, 0 without a prior."""
        problem.output = output
        return self.functions.fusedbayes_forward(self._prepared(problem))

    def backward(self, problem: Problem) -> None:
        """Writes the gradients, and the weight if it has a place."""
        self.functions.fusedbayes_backward(self._prepared(problem))

    def _prepared(self, problem: Problem) -> "ctypes._CArgObject":
        problem.parallel, problem.threads = self.parallel, torch.get_num_threads()
        problem.instruction_set = INSTRUCTION_SETS.index(self.instruction_set)
        return ctypes.byref(problem)


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
    assert functions.fusedbayes_problem_size() == ctypes.sizeof(Problem)
    functions.fusedbayes_forward.restype = ctypes.c_double
    functions.fusedbayes_backward.restype = None
    functions.fusedbayes_instruction_set.restype = ctypes.c_int64
    try:
        # Among the symbols of the process, since torch loads its OpenMP runtime for all to see.
        parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        parallel = None
    return Library(functions, INSTRUCTION_SETS[functions.fusedbayes_instruction_set()], parallel)


def library() -> Library:
    """The library; there must be one."""
    loaded = load()
    assert isinstance(loaded, Library), loaded
    return loaded

"""What the launchers share: how tensors and dtypes become kernel arguments."""

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Fresh values of these must not compile a fresh kernel. Triton does not look for them inside a tuple.
NOT_SPECIALIZED = [
    *("row_offset", "row_quad", "quad_offset", "stream"),
    *("bias_row", "bias_column", "bias_stream", "tiles_per_split"),
]

# mu, rho, prior_mu, prior_sigma; the priors may be missing, or single numbers.
Parameter = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def bias_noise(address: Sequence[int]) -> tuple[int, int, int]:
    """An address in the order of the kernels' arguments bias_row, bias_column and bias_stream."""
    stream, row_offset, column_offset = address
    return row_offset, column_offset, stream


def whole_quads(strides: Sequence[int]) -> bool:
    """Whether rows are adjacent columns that begin at whole quads: then four of them are one load."""
    row, column = strides
    return column == 1 and row % 4 == 0


def with_near_rows(activations: Tensor, rows: int, columns: int) -> Tensor:
    """The activations, or a row-major copy if offsets within so many rows and columns would not fit 32 bits."""
    row, column = activations.stride()
    return activations if rows * row + columns * column < 2**31 else activations.contiguous()


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's device; (0, 0) on the CPU, where the interpreter runs the kernels."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0)


def allow_tf32() -> bool:
    """Whether products of fp32 may round their operands to 11 bits, as torch.backends.cuda.matmul says."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def dot_options(tensor: Tensor) -> dict[str, Any]:
    """How tl.dot multiplies operands of the tensor's dtype: DOT_DTYPE and INPUT_PRECISION."""
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    # The interpreter multiplies the bit patterns of bfloat16; the operands are rounded before the cast, so that only
    # the exact products are formed in fp32.
    dtype = names[tensor.dtype] if tensor.is_cuda else tl.float32
    return {"DOT_DTYPE": dtype, "INPUT_PRECISION": "tf32" if allow_tf32() else "ieee"}

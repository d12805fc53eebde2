"""What the launchers share: how tensors and dtypes become kernel arguments."""

import torch
import triton.language as tl
from torch import Tensor

# Fresh values of these must not compile a fresh kernel.
NOT_SPECIALIZED = ["row_offset", "quad_offset", "stream"]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def is_scalar(prior: Tensor | None) -> bool:
    return prior is None or prior.dim() == 0


def as_row(prior: Tensor | None) -> Tensor | None:
    """A bias's prior as the one row that its mu is seen as; a scalar stays 0-d."""
    return prior if prior is None or prior.dim() == 0 else prior[None]


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's device; (0, 0) on the CPU, where the interpreter runs the kernels."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0)


def dot_options(tensor: Tensor) -> dict[str, object]:
    """How tl.dot multiplies operands of the tensor's dtype: DOT_DTYPE and INPUT_PRECISION."""
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    # The interpreter multiplies the bit patterns of bfloat16; the operands are rounded before the cast, so that only
    # the exact products are formed in fp32.
    dtype = names[tensor.dtype] if tensor.is_cuda else tl.float32
    allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"DOT_DTYPE": dtype, "INPUT_PRECISION": "tf32" if allow_tf32 else "ieee"}

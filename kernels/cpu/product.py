"""x W^T by whichever of PyTorch's libraries is the faster one for its shape."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# Where oneDNN multiplies faster than MKL: the least weights, rows and columns of W, and the rows of x. For each number
# of rows it compiles first, for a millisecond, which a product with fewer weights does not earn back, and keeps up to a
# megabyte for good: hence few numbers, those of most batches. With fewer columns it is the slower one.
_ONEDNN_SIZES = 1 << 21, (128, 1024), range(16, 257, 16)


def multiply(x: Tensor, weight: Tensor, b: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + b, of shapes (M, K), (N, K), (N,) and (M, N)."""
    if _is_onednns(x, weight) and (onednn := _onednn()):
        # Without b, of which it reads memory and not strides.
        product = onednn(x, weight, None, "none", [], "")
        if b is None:
            out.copy_(product)
        else:
            torch.add(product, b, out=out)
    elif b is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(b, x, weight.t(), out=out)


def _is_onednns(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN, where it is there, multiplies faster."""
    weights, least, rows = _ONEDNN_SIZES
    return (
        weight.numel() >= weights
        and x.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
        and x.shape[0] in rows
        and all(size >= bound for size, bound in zip(weight.shape, least, strict=True))
        and weight.is_contiguous()  # of another it makes a copy, if it can read it at all
    )


@functools.cache
def _onednn() -> Callable[..., Tensor] | None:
    """x weight^T as oneDNN computes it, where torch has it and `torch.mm` would leave the product to MKL."""
    if torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise.default
    return None

"""Transcendental functions of the kernels, in one place.

These are Triton's portable ones, which the interpreter has too.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) for every finite x, as accurate as exp: where x is negative, relatively.

    With t = exp(-|x|), log(1 + t) loses t's low bits where 1 + t is rounded; adding t - ((1 + t) - 1) restores them.
    """
    t = exp(-tl.abs(x))
    u = 1.0 + t
    return tl.maximum(x, 0.0) + (log(u) + (t - (u - 1.0)))

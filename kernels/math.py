"""Elementary functions, each twice: the hardware's approximation on CUDA, Triton's portable one elsewhere.

Elsewhere is the interpreter, AMD and Intel. What is built on these functions is the same code for both, so that the
interpreter tests it. Largest errors of the approximations by the PTX manual: ex2 2^-22.5, sqrt 2^-23 and rcp 2^-23
relatively, lg2 2^-22 (relatively outside [0.5, 2]), sin and cos 2^-20.9 between -pi and pi.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda
from triton.runtime.jit import constexpr_function

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)  # 2^-126


@constexpr_function
def fast() -> bool:
    """Whether to use PTX's approximations; known when a kernel is compiled."""
    return is_cuda() and not triton.knobs.runtime.interpret


@triton.jit
def _ptx(INSTRUCTION: tl.constexpr, x):
    """The instruction's result for each fp32 of x."""
    asm: tl.constexpr = INSTRUCTION + " $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x):
    """2^x; results below 2^-126 are 0."""
    if fast():
        y = _ptx("ex2.approx.ftz.f32", x)
    else:
        y = tl.exp2(x)
        y = tl.where(y < SMALLEST_NORMAL, 0.0, y)
    return y


@triton.jit
def log2(x):
    if fast():
        y = _ptx("lg2.approx.ftz.f32", x)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def sqrt(x):
    if fast():
        y = _ptx("sqrt.approx.ftz.f32", x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def reciprocal(x):
    if fast():
        y = _ptx("rcp.approx.ftz.f32", x)
    else:
        y = 1.0 / x
    return y


@triton.jit
def sin(x):
    if fast():
        y = _ptx("sin.approx.ftz.f32", x)
    else:
        y = tl.sin(x)
    return y


@triton.jit
def cos(x):
    if fast():
        y = _ptx("cos.approx.ftz.f32", x)
    else:
        y = tl.cos(x)
    return y


@triton.jit
def absolute(x):
    """|x|; tl.abs compiles to an instruction of its own, this into a modifier of the one that reads it."""
    if fast():
        y = _ptx("abs.f32", x)
    else:
        y = tl.abs(x)
    return y


@triton.jit
def negative(x):
    """-x; Triton's own is 0 - x, an instruction, this a modifier of the one that reads it."""
    if fast():
        y = _ptx("neg.f32", x)
    else:
        y = -x
    return y


@triton.jit
def scaled_difference(scale: tl.constexpr, unit: tl.constexpr, x):
    """Scale (1 - unit x) for a unit that is a power of two, relatively accurate for unit x next to 1."""
    if fast():
        y = tl.fma(x, -(scale * unit), scale)
    else:  # the interpreter's fma rounds twice
        y = scale * (1.0 - unit * x)
    return y


@triton.jit
def multiply_wide(a, b: tl.constexpr):
    """High and low word of the 64-bit product of uint32 a and the constant b, by one instruction.

    Written in Triton, LLVM's reordering of the xors that follow splits it into two multiplications.
    """
    if fast():
        asm: tl.constexpr = "mul.wide.u32 $0, $1, $2;"
        product = tl.inline_asm_elementwise(asm, "=l,r,r", [a, b], tl.uint64, is_pure=True, pack=1)
    else:
        product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def anew(x, step):
    """x mod 2^32, and what is computed from it is computed anew in each step of a loop.

    As a function of `step` to the compiler, which would compute it before the loop and hold it in registers.
    """
    x = x.to(tl.uint32)
    if fast():
        asm: tl.constexpr = "mov.u32 $0, $1; // $2"
        x = tl.inline_asm_elementwise(asm, "=r,r,r", [x, step], tl.uint32, is_pure=True, pack=1)
    return x


@triton.jit
def once(x, step):
    """x, which is not computed again for another layout that it is needed in.

    Seemingly a function of `step` too: a scalar, at which Triton stops its search for what an operand of a product is
    loaded from. It has another way to the operands of sm_100, where this would cost a move and save nothing.
    """
    if fast():
        if not cuda_capability_geq(10):
            asm: tl.constexpr = "mov.b32 $0, $1; // $2"
            x = tl.inline_asm_elementwise(asm, "=f,f,r", [x, step], tl.float32, is_pure=True, pack=1)
    return x

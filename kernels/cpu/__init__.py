"""The CPU kernel: the operators of `fusedbayes.ops` in C++, one pass over the parameters each.

Each launcher takes and returns tensors like the operator of the same name, allocates its outputs and validates nothing.
Matrix products are the library's. The C++ is fused.cpp and the headers beside it; `native.load` says whether it was
built.
"""

from fusedbayes.kernels.cpu.linear import bayes_linear, bayes_linear_backward
from fusedbayes.kernels.cpu.mixture import scale_mixture_kl, scale_mixture_kl_backward
from fusedbayes.kernels.cpu.native import DTYPES
from fusedbayes.kernels.cpu.sample import (
    normal,
    sample_weight,
    sample_weight_backward,
    signs,
    weight_kl,
    words,
)

__all__ = [
    "DTYPES",
    "bayes_linear",
    "bayes_linear_backward",
    "normal",
    "sample_weight",
    "sample_weight_backward",
    "scale_mixture_kl",
    "scale_mixture_kl_backward",
    "signs",
    "weight_kl",
    "words",
]

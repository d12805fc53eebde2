"""The operators ``torch.ops.fusedbayes.*``: schemas, autograd, and who computes them where.

On CUDA Triton computes them, on the CPU a C++ kernel if it is built (see `backend_info`), anywhere else PyTorch after
`fusedbayes.reference`. For its backward an operator keeps what it was given, and under "local" one number for each
output; the noise of the weights is drawn again from the seed. Inputs are validated by `fusedbayes.functional`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, register_fake

from fusedbayes.ops import autograd, cpu, cuda, eager, fake

# An address is (stream, row_offset, column_offset): fusedbayes.noise.Address. sample is a 0-d int64 tensor, because an
# int would have torch.compile compile every Monte Carlo sample anew; None means 0. Parameters are 2-D, a bias in
# bayes_linear 1-D. Without with_kl no KL is computed, and the KL that is returned has no element; the prior is kept for
# the backward pass all the same, so that a checkpointed forward saves the same tensors with and without. Likewise
# gradients that are not needed, or of a bias that there is none of, have no element. A scale mixture is three numbers,
# 0-d, that have no gradients. The rows of x are num_samples batches, one for each Monte Carlo sample from `sample` on,
# or with same_input one batch for all of them. slope is what the local estimator keeps for its backward pass, the
# outputs' derivative by their variance; of the other estimators it has no element and the shape (0, num_samples), by
# which a checkpoint that is repeated for another number is found out.
_SCHEMAS = {
    "sample_weight": """(Tensor mu, Tensor rho, Tensor? prior_mu, Tensor? prior_sigma, Tensor seed, Tensor? sample,
        int[] address, ScalarType dtype, bool with_kl) -> (Tensor weight, Tensor kl)""",
    "sample_weight_backward": """(Tensor? grad_weight, Tensor? grad_kl, Tensor mu, Tensor rho, Tensor? prior_mu,
        Tensor? prior_sigma, Tensor? seed, Tensor? sample, int[] address) -> (Tensor grad_mu, Tensor grad_rho)""",
    "weight_kl": "(Tensor mu, Tensor rho, Tensor prior_mu, Tensor prior_sigma) -> Tensor",
    "scale_mixture_kl": """(Tensor mu, Tensor rho, Tensor pi, Tensor sigma_1, Tensor sigma_2, Tensor seed,
        Tensor? sample, int[] address) -> Tensor""",
    "scale_mixture_kl_backward": """(Tensor grad_kl, Tensor mu, Tensor rho, Tensor pi, Tensor sigma_1, Tensor sigma_2,
        Tensor seed, Tensor? sample, int[] address) -> (Tensor grad_mu, Tensor grad_rho)""",
    "bayes_linear": """(Tensor x, Tensor weight_mu, Tensor weight_rho, Tensor? weight_prior_mu,
        Tensor? weight_prior_sigma, Tensor? bias_mu, Tensor? bias_rho, Tensor? bias_prior_mu, Tensor? bias_prior_sigma,
        Tensor seed, Tensor? sample, int[] weight_address, int[] bias_address, int num_samples, bool same_input,
        str estimator, bool with_kl) -> (Tensor y, Tensor kl, Tensor slope)""",
    "bayes_linear_backward": """(Tensor grad_y, Tensor? grad_kl, Tensor slope, Tensor x, Tensor weight_mu,
        Tensor weight_rho, Tensor? weight_prior_mu, Tensor? weight_prior_sigma, Tensor? bias_mu, Tensor? bias_rho,
        Tensor? bias_prior_mu, Tensor? bias_prior_sigma, Tensor seed, Tensor? sample, int[] weight_address,
        int[] bias_address, int num_samples, str estimator, bool needs_x, bool needs_weight) -> (Tensor grad_x,
        Tensor grad_weight_mu, Tensor grad_weight_rho, Tensor grad_bias_mu, Tensor grad_bias_rho)""",
    # Noise of the global rows row_offset + rows, rows an int64 vector. Nothing is differentiable.
    "normal": "(Tensor rows, int columns, Tensor seed, Tensor? sample, int[] address, ScalarType dtype) -> Tensor",
    "signs": "(Tensor rows, int columns, Tensor seed, Tensor? sample, int[] address, ScalarType dtype) -> Tensor",
}

_library = Library("fusedbayes", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(eager, _name), "CompositeExplicitAutograd")
    _library.impl(_name, cpu.implementation(_name), "CPU")
    _library.impl(_name, cuda.implementation(_name), "CUDA")
    register_fake(f"fusedbayes::{_name}", getattr(fake, _name), lib=_library)
for _name in autograd.DIFFERENTIABLE:
    _library.impl(_name, getattr(autograd, _name), "Autograd")


def _entry(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.fusedbayes, name).default
    differentiable, transparent = getattr(autograd, name), getattr(eager, name)

    def call(*arguments: Any) -> Any:
        # Neither torch.func nor forward-mode derivatives, compiled or not, can look into an operator; into PyTorch they
        # can.
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return transparent(*arguments)
        if torch.compiler.is_compiling():
            return operator(*arguments)
        # What the operator would do first, without the dispatcher's way there.
        return differentiable(*arguments)

    return call


def _entry_of_noise(name: str) -> Callable[..., Tensor]:
    transparent = getattr(eager, name)

    def call(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return transparent(*arguments)
        return cpu.direct(name, cpu.served(arguments))(*arguments)

    return call


normal = _entry_of_noise("normal")
signs = _entry_of_noise("signs")
sample_weight = _entry("sample_weight")
weight_kl = _entry("weight_kl")
scale_mixture_kl = _entry("scale_mixture_kl")
bayes_linear = _entry("bayes_linear")

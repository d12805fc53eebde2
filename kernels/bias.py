"""A bias inside the kernels of its weight: one element per output, drawn, charged and differentiated there."""

import triton
import triton.language as tl

from fusedbayes.kernels.gaussian import gaussian_gradients, kl_centres, kl_from_sums, kl_terms, sigma_from_rho
from fusedbayes.kernels.noise import normal_vector


@triton.jit
def _load(ptr, outputs, exist, other: tl.constexpr, IS_SCALAR: tl.constexpr = False):
    """The elements (R,) at `outputs` in fp32, or the scalar."""
    if IS_SCALAR:
        value = tl.load(ptr).to(tl.float32)
    else:
        value = tl.load(ptr + outputs, mask=exist, other=other).to(tl.float32)
    return value


@triton.jit
def sample_bias(
    mu_ptr,  # (N,)
    rho_ptr,  # (N,)
    prior_mu_ptr,  # () or (N,), read with WITH_KL
    prior_sigma_ptr,  # () or (N,), read with WITH_KL
    outputs,  # (R,)
    N,
    seed,
    sample,
    row,
    column,
    stream,
    WITH_KL: tl.constexpr,
    PRIOR_MU_SCALAR: tl.constexpr,
    PRIOR_SIGMA_SCALAR: tl.constexpr,
):
    """b = mu + sigma eps at `outputs`, fp32, and the sum of their KL; row, column: of the bias in the noise."""
    exist = outputs < N
    mu = _load(mu_ptr, outputs, exist, 0.0)
    sigma = sigma_from_rho(_load(rho_ptr, outputs, exist, 0.0))
    bias = mu + sigma * normal_vector(seed, row, tl.cast(column, tl.int64) + outputs, sample, stream)
    kl = 0.0
    if WITH_KL:
        prior_mu = _load(prior_mu_ptr, outputs, exist, 0.0, PRIOR_MU_SCALAR)
        prior_sigma = _load(prior_sigma_ptr, outputs, exist, 1.0, PRIOR_SIGMA_SCALAR)
        logarithm, scale, shift = kl_terms(mu, sigma, prior_mu, prior_sigma, PRIOR_SIGMA_SCALAR)
        centres = kl_centres(prior_sigma, PRIOR_SIGMA_SCALAR)
        logarithms = tl.sum(tl.where(exist, logarithm - centres[0], 0.0))
        squares = tl.sum(tl.where(exist, scale * scale + shift * shift - centres[1], 0.0))
        kl = kl_from_sums(logarithms, squares, centres)
    return bias, kl


@triton.jit
def sum_over_batch(grad_y_ptr, M, N, stride_m, stride_n, outputs):
    """dL/db (R,) fp32 at `outputs` (R,): the sum over dY's M rows."""
    columns = grad_y_ptr + outputs.to(tl.int64)[None, :] * stride_n
    # Added up once at the end: a reduction within the loop does not compile for every layout of fp32.
    sums = tl.zeros((16, outputs.shape[0]), tl.float32)
    for begin in range(0, M, 16):
        batch = begin + tl.arange(0, 16)
        in_bounds = (batch < M)[:, None] & (outputs < N)[None, :]
        grad_y = tl.load(columns + batch.to(tl.int64)[:, None] * stride_m, mask=in_bounds, other=0.0)
        sums += grad_y.to(tl.float32)
    return tl.sum(sums, axis=0)


@triton.jit
def store_bias_gradients(
    grad_mu_ptr,  # (N,)
    grad_rho_ptr,  # (N,)
    grad_bias,  # (R,) fp32
    grad_kl_ptr,  # () fp32, or None
    mu_ptr,  # (N,)
    rho_ptr,  # (N,)
    prior_mu_ptr,  # () or (N,)
    prior_sigma_ptr,  # () or (N,)
    outputs,  # (R,)
    N,
    seed,
    sample,
    row,
    column,
    stream,
    PRIOR_MU_SCALAR: tl.constexpr,
    PRIOR_SIGMA_SCALAR: tl.constexpr,
):
    """dmu and drho at `outputs` of `gaussian_gradients`, the noise drawn again."""
    exist = outputs < N
    mu, rho = _load(mu_ptr, outputs, exist, 0.0), _load(rho_ptr, outputs, exist, 0.0)
    grad_kl, prior_mu, prior_sigma = 0.0, 0.0, 1.0
    if grad_kl_ptr is not None:
        grad_kl = tl.load(grad_kl_ptr)
        prior_mu = _load(prior_mu_ptr, outputs, exist, 0.0, PRIOR_MU_SCALAR)
        prior_sigma = _load(prior_sigma_ptr, outputs, exist, 1.0, PRIOR_SIGMA_SCALAR)
    eps = normal_vector(seed, row, tl.cast(column, tl.int64) + outputs, sample, stream)
    grad_mu, grad_rho = gaussian_gradients(
        grad_bias, grad_kl, mu, rho, eps, prior_mu, prior_sigma, grad_kl_ptr is not None
    )
    tl.store(grad_mu_ptr + outputs, grad_mu.to(grad_mu_ptr.dtype.element_ty), mask=exist)
    tl.store(grad_rho_ptr + outputs, grad_rho.to(grad_rho_ptr.dtype.element_ty), mask=exist)

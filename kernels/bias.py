"""A bias inside the kernels of its weight: one element per output, drawn, charged and differentiated there."""

import triton
import triton.language as tl

from fusedbayes.kernels.gaussian import gaussian_gradients, kl_centres, kl_from_sums, kl_terms, sigma_from_rho
from fusedbayes.kernels.noise import normal_vector
from fusedbayes.kernels.parameter import load_elements, open_prior, prior_at


@triton.jit
def _load(bias, outputs, exist):
    """mu and rho at `outputs`, in fp32."""
    mu = load_elements(bias.mu, outputs, exist, 0.0).to(tl.float32)
    return mu, load_elements(bias.rho, outputs, exist, 0.0).to(tl.float32)


@triton.jit
def bias_moments(bias, outputs, N, WITH_KL: tl.constexpr):
    """mu and sigma of a `Gaussian` (N,) at `outputs` (R,), fp32, and the sum of their KL."""
    exist = outputs < N
    mu, rho = _load(bias, outputs, exist)
    sigma = sigma_from_rho(rho)
    kl = 0.0
    if WITH_KL:
        prior = open_prior(bias, 0)
        prior_mu, prior_sigma = prior_at(prior, outputs, exist)
        centres = kl_centres(prior[1])
        logarithm, scale, shift = kl_terms(mu, sigma, prior_mu, prior_sigma)
        logarithms = tl.sum(tl.where(exist, logarithm - centres[0], 0.0))
        squares = tl.sum(tl.where(exist, scale * scale + shift * shift - centres[1], 0.0))
        kl = kl_from_sums(logarithms, squares, centres)
    return mu, sigma, kl


@triton.jit
def bias_term(
    bias,  # a `Gaussian` (N,)
    noise,  # of one row, at the columns of the outputs
    outputs,  # (R,)
    N,
    PRODUCT: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    DTYPE: tl.constexpr,
    WITH_KL: tl.constexpr,
):
    """What the bias adds to an estimator's product of this number, fp32, and the sum of its KL."""
    mu, sigma, kl = bias_moments(bias, outputs, N, WITH_KL)
    if ESTIMATOR == "local":
        term = mu.to(DTYPE).to(tl.float32)
        if PRODUCT == 1:
            term = sigma * sigma
    else:
        term = (mu + sigma * normal_vector(*noise)).to(DTYPE).to(tl.float32)
        if ESTIMATOR == "flipout" and PRODUCT == 1:
            term = tl.zeros_like(term)
    return term, kl


@triton.jit
def sum_over_batch(
    grad_y_ptr,  # (num_samples, M, N)
    second_grad_ptr,  # likewise, for "local"
    noise,  # of one row, at the columns of the outputs; for the others
    num_samples,
    M,
    N,
    stride_m,
    stride_n,
    outputs,  # (R,)
    ESTIMATOR: tl.constexpr,
):
    """What the output says of a bias's mu, the sum over dY's rows, and of its sigma; (R,) fp32 at `outputs`.

    For sigma it is the sum of dY eps, with the eps of each Monte Carlo sample. For "local", where no bias is drawn, it
    is without the factor 2 sigma: the sum over the second operand's rows.
    """
    columns = outputs.to(tl.int64)[None, :] * stride_n
    # Added up once at the end: a reduction within the loop does not compile for every layout of fp32.
    grad_mu = tl.zeros((16, outputs.shape[0]), tl.float32)
    grad_sigma = grad_mu
    for index in range(num_samples):
        start = tl.cast(index, tl.int64) * M
        if ESTIMATOR != "local":
            eps = normal_vector(noise.seed, noise.rows, noise.columns, noise.sample + index, noise.stream)[None, :]
        for begin in range(0, M, 16):
            batch = begin + tl.arange(0, 16)
            in_bounds = (batch < M)[:, None] & (outputs < N)[None, :]
            offsets = columns + (start + batch)[:, None] * stride_m
            grad_y = tl.load(grad_y_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
            grad_mu += grad_y
            if ESTIMATOR == "local":
                grad_sigma += tl.load(second_grad_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
            else:
                grad_sigma += grad_y * eps
    return tl.sum(grad_mu, axis=0), tl.sum(grad_sigma, axis=0)


@triton.jit
def store_bias_gradients(
    grads,  # `Gradients` (N,)
    sums,  # of `sum_over_batch`
    grad_kl_ptr,  # () fp32, or None
    bias,  # a `Gaussian` (N,)
    outputs,  # (R,)
    N,
    ESTIMATOR: tl.constexpr,
    ADD: tl.constexpr,  # to the gradients that are there
):
    """dmu and drho at `outputs` of `gaussian_gradients`."""
    exist = outputs < N
    mu, rho = _load(bias, outputs, exist)
    grad_kl, prior_mu, prior_sigma = 0.0, 0.0, 1.0
    if grad_kl_ptr is not None:
        grad_kl = tl.load(grad_kl_ptr)
        prior_mu, prior_sigma = prior_at(open_prior(bias, 0), outputs, exist)
    grad_mu, grad_sigma = sums
    if ESTIMATOR == "local":
        grad_sigma *= 2.0 * sigma_from_rho(rho)
    grad_mu, grad_rho = gaussian_gradients(
        grad_mu, grad_sigma, grad_kl, mu, rho, prior_mu, prior_sigma, grad_kl_ptr is not None
    )
    if ADD:
        grad_mu += load_elements(grads.mu, outputs, exist, 0.0)
        grad_rho += load_elements(grads.rho, outputs, exist, 0.0)
    tl.store(grads.mu + outputs, grad_mu.to(grads.mu.dtype.element_ty), mask=exist)
    tl.store(grads.rho + outputs, grad_rho.to(grads.rho.dtype.element_ty), mask=exist)

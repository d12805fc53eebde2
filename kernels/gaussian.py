"""Device functions of a Gaussian weight: its standard deviation, its KL, its gradients."""

import triton
import triton.language as tl

from fusedbayes.kernels.math import exp, log, softplus

# fusedbayes.reference.SIGMA_FLOOR: 2^-126, the smallest normal fp32.
SIGMA_FLOOR = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def load_fp32(ptr, offsets, mask):
    """The tile at `offsets` in fp32, 0 where masked."""
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_prior(ptr, offsets, mask, IS_SCALAR: tl.constexpr):
    """One prior tensor, fp32: the scalar, or the tile at `offsets` with 1 where masked (log and 1/x stay finite)."""
    if IS_SCALAR:
        value = tl.load(ptr).to(tl.float32)
    else:
        value = tl.load(ptr + offsets, mask=mask, other=1.0).to(tl.float32)
    return value


@triton.jit
def sigma_from_rho(rho):
    """Sigma = max(softplus(rho), 2^-126)."""
    return tl.maximum(softplus(rho), SIGMA_FLOOR)


@triton.jit
def gaussian_kl(mu, sigma, prior_mu, prior_sigma):
    """log(s0 / sigma) + (sigma^2 + (mu - m0)^2) / (2 s0^2) - 1/2 per weight."""
    scale = sigma / prior_sigma
    shift = (mu - prior_mu) / prior_sigma
    return log(prior_sigma) - log(sigma) + 0.5 * (scale * scale + shift * shift - 1.0)


@triton.jit
def gaussian_gradients(grad_weight, grad_kl, mu, rho, eps, prior_mu, prior_sigma, WITH_KL: tl.constexpr):
    """dmu = G + g (mu - m0) / s0^2 and drho = (G eps + g (sigma / s0^2 - 1 / sigma)) sigmoid(rho).

    G = dL/dW is `grad_weight`, g = dL/dKL is `grad_kl`. sigmoid(rho) = exp(rho - softplus(rho)), which does not cancel
    where sigma is small; there sigmoid / sigma is 1, while g / sigma would overflow. Below the floor sigma is constant
    and drho is 0.
    """
    sigma = softplus(rho)
    sigmoid = tl.where(sigma < SIGMA_FLOOR, 0.0, exp(rho - sigma))
    dmu = grad_weight
    drho = grad_weight * eps * sigmoid
    if WITH_KL:
        sigma = tl.maximum(sigma, SIGMA_FLOOR)
        dmu += grad_kl * ((mu - prior_mu) / prior_sigma / prior_sigma)
        drho += grad_kl * (sigma / prior_sigma / prior_sigma * sigmoid - sigmoid / sigma)
    return dmu, drho


@triton.jit
def store_gradients(
    grad_mu_ptr,  # (N, K) row-major
    grad_rho_ptr,  # (N, K) row-major
    grad_weight,  # tile of dL/dW, fp32
    eps,  # tile of the forward's noise
    grad_kl_ptr,  # () fp32, or None
    mu_ptr,  # (N, K) row-major
    rho_ptr,  # (N, K) row-major
    prior_mu_ptr,  # () or (N, K) row-major
    prior_sigma_ptr,  # () or (N, K) row-major
    offsets,
    in_bounds,
    PRIOR_MU_SCALAR: tl.constexpr,
    PRIOR_SIGMA_SCALAR: tl.constexpr,
):
    """Writes the tile's dmu and drho, the KL's share included unless grad_kl_ptr is None."""
    mu = load_fp32(mu_ptr, offsets, in_bounds)
    rho = load_fp32(rho_ptr, offsets, in_bounds)
    grad_kl = 0.0
    prior_mu = 0.0
    prior_sigma = 1.0
    if grad_kl_ptr is not None:
        grad_kl = tl.load(grad_kl_ptr)
        prior_mu = load_prior(prior_mu_ptr, offsets, in_bounds, PRIOR_MU_SCALAR)
        prior_sigma = load_prior(prior_sigma_ptr, offsets, in_bounds, PRIOR_SIGMA_SCALAR)
    grad_mu, grad_rho = gaussian_gradients(
        grad_weight, grad_kl, mu, rho, eps, prior_mu, prior_sigma, grad_kl_ptr is not None
    )
    tl.store(grad_mu_ptr + offsets, grad_mu.to(grad_mu_ptr.dtype.element_ty), mask=in_bounds)
    tl.store(grad_rho_ptr + offsets, grad_rho.to(grad_rho_ptr.dtype.element_ty), mask=in_bounds)

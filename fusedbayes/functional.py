"""Stateless functions: they validate, draw the seed and call the operators.

Shapes, dtypes and errors are documented here once; `fusedbayes.nn` holds the parameters. Everywhere ``sigma`` is a
standard deviation and ``sigma = softplus(rho)``.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fusedbayes import ops, reference
from fusedbayes.arguments import (
    Prior,
    as_matrix,
    check_address,
    check_estimator,
    check_linear,
    check_parameter,
    check_samples,
    fused_prior,
    like,
    prior_tensors,
    scale_mixture_number,
    seed_and_sample,
)
from fusedbayes.checks import describe
from fusedbayes.noise import Address, Role, check_coordinates
from fusedbayes.recompute import recomputed
from fusedbayes.reference import Estimator


def gaussian_kl(
    mu: Tensor,
    *,
    sigma: float | Tensor | None = None,
    log_var: Tensor | None = None,
    prior_mu: float | Tensor = 0.0,
    prior_sigma: float | Tensor = 1.0,
    reduction: Literal["sum", "batchmean", "mean", "none"] = "sum",
) -> Tensor:
    """KL(N(mu, sigma^2) || N(prior_mu, prior_sigma^2)) of independent Gaussians, in nats.

    For weights take the default "sum": the KL of a layer is the sum over its weights. For the latents of a VAE, of
    shape (batch, latent), take "batchmean": the sum over everything but the first dimension, averaged over it; that is
    the term of the ELBO per example (Kingma and Welling 2014, appendix B).

    Args:
        mu: means, any shape, floating dtype.
        sigma: standard deviations > 0, broadcastable to `mu`. Exactly one of `sigma` and `log_var` is given.
        log_var: log variances, log(sigma^2), any finite value.
        prior_mu, prior_sigma: the prior's mean and standard deviation (> 0), broadcastable to `mu`.
        reduction: "sum", "batchmean", "mean" (over every element) or "none".

    Returns:
        0-d tensor, or a tensor of mu's shape for "none"; float32, or float64 for float64 `mu`. Differentiable in every
        tensor argument.

    Raises:
        TypeError: `mu` is not a floating tensor, or both or neither of `sigma` and `log_var` are given.
        ValueError: a standard deviation given as a number is not positive, a shape does not broadcast to mu's,
            "batchmean" of a tensor without a batch, or an unknown reduction.

    Values inside tensors are not checked: that would wait for the device.
    """
    if not isinstance(mu, Tensor) or not mu.is_floating_point():
        raise TypeError(f"mu must be a floating-point tensor, got {describe(mu)}")
    if (sigma is None) == (log_var is None):
        raise TypeError("give exactly one of sigma and log_var, got " + ("neither" if sigma is None else "both"))
    if reduction not in ("sum", "batchmean", "mean", "none"):
        raise ValueError(f"reduction must be 'sum', 'batchmean', 'mean' or 'none', got {reduction!r}")
    if reduction == "batchmean" and (mu.dim() == 0 or mu.shape[0] == 0):
        raise ValueError(f"reduction 'batchmean' needs a non-empty first dimension, got mu of shape {tuple(mu.shape)}")
    log_sigma = None
    if log_var is not None:
        log_sigma = 0.5 * like(mu, log_var, "log_var").to(reference.compute_dtype(mu))
        sigma = log_sigma.exp()
    assert sigma is not None
    sigma = like(mu, sigma, "sigma", positive=True)
    kl = reference.gaussian_kl(mu, sigma, *prior_tensors(mu, (prior_mu, prior_sigma), ""), log_sigma)
    if reduction == "sum":
        return kl.sum()
    if reduction == "mean":
        return kl.mean()
    return kl.sum() / mu.shape[0] if reduction == "batchmean" else kl


def weight_kl(mu: Tensor, rho: Tensor, prior: Prior) -> Tensor:
    """The KL of the weights N(mu, softplus(rho)^2) from their prior, summed: one pass over the parameters.

    Args:
        mu, rho: same shape, floating dtype and device.
        prior: (prior_mu, prior_sigma), each a number or a tensor that broadcasts to mu's shape;
            prior_sigma > 0, neither requiring grad.

    Returns:
        0-d float32 (float64 for float64 parameters), in nats.

    Raises:
        TypeError, ValueError: as `sample_weight`.
    """
    check_parameter(mu, rho, "")
    return ops.weight_kl(*(as_matrix(t) for t in (mu, rho, *fused_prior(mu, prior, ""))))


def weight_kl_estimate(
    mu: Tensor,
    rho: Tensor,
    log_prob: Callable[[Tensor], Tensor],
    *,
    seed: int | Tensor | None = None,
    sample: int | Tensor | None = None,
    address: Address = Address(Role.WEIGHT),
) -> Tensor:
    """The KL of the weights N(mu, softplus(rho)^2) from any prior, estimated by one sample w of them.

    The sum of log q(w) - log p(w) with w = mu + sigma eps: unbiased, and so are its gradients (Blundell et al., "Weight
    uncertainty in neural networks", ICML 2015, equation 2 and proposition 1). Everything is computed a second time in
    the backward pass, with the same noise; only the arguments and the seed are kept for it.

    Args:
        mu, rho: any shape, same floating dtype and device.
        log_prob: gives log p(w), of w's shape, for w in float32 (float64 for float64 parameters). Tensors that it
            depends on get their gradients too. It must not draw random numbers.
        seed, sample, address: which noise, as for `sample_weight`.

    Returns:
        0-d float32 (float64 for float64 parameters), in nats; negative at times.

    Raises:
        TypeError, ValueError: as `sample_weight`; `log_prob` is not callable, or returns no tensor of w's shape.
    """
    check_parameter(mu, rho, "")
    if not callable(log_prob):
        raise TypeError(f"log_prob must be callable as log_prob(w), got {describe(log_prob)}")
    check_address(address, "address", *reference.matrix_shape(mu))
    dtype = reference.compute_dtype(mu)
    key = seed_and_sample(seed, sample, mu.device)

    def estimate(mu: Tensor, rho: Tensor, *key: Tensor) -> Tensor:
        mu, sigma = mu.to(dtype), reference.sigma_from_rho(rho.to(dtype))
        eps = _standard_normal(mu, *key, address=address)
        log_p = log_prob(mu + sigma * eps)
        if not isinstance(log_p, Tensor) or log_p.shape != mu.shape:
            raise ValueError(
                f"log_prob must return a tensor of the shape of w, {tuple(mu.shape)}, got {describe(log_p)}"
            )
        return (reference.normal_log_prob(eps, sigma.log()) - log_p).sum(dtype=dtype)

    return recomputed(estimate, mu, rho, *(tensor for tensor in key if tensor is not None))


def scale_mixture_kl(
    mu: Tensor,
    rho: Tensor,
    *,
    pi: float | Tensor,
    sigma_1: float | Tensor,
    sigma_2: float | Tensor,
    seed: int | Tensor | None = None,
    sample: int | Tensor | None = None,
    address: Address = Address(Role.WEIGHT),
) -> Tensor:
    """The KL of the weights from pi N(0, sigma_1^2) + (1 - pi) N(0, sigma_2^2), estimated by one sample w of them.

    What `weight_kl_estimate` gives for this prior (Blundell et al., "Weight uncertainty in neural networks", ICML 2015,
    equation 7) and the same noise, by one fused pass over mu and rho; another one for the gradients.

    Args:
        mu, rho: any shape, same floating dtype and device.
        pi: share of the first, between 0 and 1; a number or a 0-d tensor that does not require grad.
        sigma_1, sigma_2: standard deviations, likewise, between 1e-15 and 1e15.
        seed, sample, address: which noise, as for `sample_weight`.

    Returns:
        0-d float32 (float64 for float64 parameters), in nats; negative at times.

    Raises:
        TypeError, ValueError: as `sample_weight`; pi or a deviation is a number out of its range, a tensor that is not
            0-d or one that requires grad.
    """
    check_parameter(mu, rho, "")
    mixture = [scale_mixture_number(mu, *named) for named in (("pi", pi), ("sigma_1", sigma_1), ("sigma_2", sigma_2))]
    check_address(address, "address", *reference.matrix_shape(mu))
    noise = (*seed_and_sample(seed, sample, mu.device), address)
    return ops.scale_mixture_kl(as_matrix(mu), as_matrix(rho), *mixture, *noise)


def _standard_normal(like: Tensor, seed: Tensor, sample: Tensor | None = None, *, address: Address) -> Tensor:
    """eps of the shape and dtype of `like`: sampled weights whose mean is 0 and whose deviation is 1."""
    rows, columns = reference.matrix_shape(like)
    mu, sigma = (torch.full((), value, dtype=like.dtype, device=like.device) for value in (0.0, 1.0))
    moments = (tensor.expand(rows, columns) for tensor in (mu, reference.rho_from_sigma(sigma)))
    eps, _ = ops.sample_weight(*moments, None, None, seed, sample, address, like.dtype, False)
    return eps.view(like.shape)


def sample_weight(
    mu: Tensor,
    rho: Tensor,
    *,
    prior: Prior | None = None,
    with_kl: bool = True,
    seed: int | Tensor | None = None,
    sample: int | Tensor | None = None,
    address: Address = Address(Role.WEIGHT),
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Samples w = mu + softplus(rho) * eps and, given a prior, its KL in the same pass.

    Neither eps nor a copy of w is kept for the backward pass: eps is drawn again from the seed (docs/math.md).

    Args:
        mu, rho: any shape, same floating dtype and device. The noise is addressed in ``mu.flatten(1)``, or in one row
            for a vector.
        prior: None (default: no KL is computed) or (prior_mu, prior_sigma), each a number or a tensor that broadcasts
            to mu's shape; prior_sigma > 0, neither requiring grad.
        with_kl: False leaves the KL out although there is a prior (default True).
        seed: an int or a 0-d int64 tensor; default a fresh one from torch's generator.
        sample: index of the Monte Carlo sample, an int in [0, 2**32) or a 0-d int64 tensor; default 0.
        address: stream and shard offsets of the noise.
        dtype: of the sample; default mu's. Arithmetic is float32 (float64 for float64 parameters) in any case.

    Returns:
        (w, kl): w of mu's shape and `dtype`; kl 0-d float32 (float64 for float64 parameters), or None if it is not
        computed.

    Raises:
        TypeError: an argument is not of a type given above, or mu and rho differ in dtype.
        ValueError: shapes or devices differ, prior_sigma as a number is not positive, a prior requires grad, or the
            address is out of range.
    """
    check_parameter(mu, rho, "")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {describe(dtype)}")
    check_address(address, "address", *reference.matrix_shape(mu))
    priors = () if prior is None else fused_prior(mu, prior, "")
    mu_2d, rho_2d, *priors_2d = (as_matrix(t) for t in (mu, rho, *priors))
    noise = (*seed_and_sample(seed, sample, mu.device), address)
    with_kl = with_kl and prior is not None
    weight, kl = ops.sample_weight(mu_2d, rho_2d, *(priors_2d or (None, None)), *noise, dtype or mu.dtype, with_kl)
    return weight.view(mu.shape), kl if with_kl else None


def bayes_linear(
    x: Tensor,
    weight_mu: Tensor,
    weight_rho: Tensor,
    bias_mu: Tensor | None = None,
    bias_rho: Tensor | None = None,
    *,
    weight_prior: Prior | None = None,
    bias_prior: Prior | None = None,
    with_kl: bool = True,
    seed: int | Tensor | None = None,
    sample: int | Tensor | None = None,
    weight_address: Address = Address(Role.WEIGHT),
    bias_address: Address = Address(Role.BIAS),
    num_samples: int = 1,
    same_input: bool = False,
    estimator: Estimator = "shared",
) -> tuple[Tensor, Tensor | None]:
    """y = x W^T + b with W ~ N(weight_mu, softplus(weight_rho)^2), likewise b, and the KL of both.

    Estimators (docs/estimators.md says which to choose when):

    - "shared": one W and b for the whole batch (Blundell et al., "Weight uncertainty in neural networks", ICML 2015,
      equations 1 to 4).
    - "local": each row's outputs are drawn from their distribution, independently of other rows, those of the same
      example included (tokens of a sequence, say): y = x mu^T + b_mu + sqrt(x^2 (sigma^2)^T + sigma_b^2) * zeta
      (Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick", NeurIPS 2015,
      equation 6).
    - "flipout": one W, decorrelated between the rows by random signs r and s, y = x mu^T + ((x * r) (sigma eps)^T) * s
      + b (Wen et al., "Flipout: efficient pseudo-independent weight perturbations on mini-batches", ICLR 2018,
      equation 4).

    Nothing but the arguments and the seed is kept for the backward pass, and for "local" one number of x's dtype for
    each output. Under autocast x is cast to autocast's dtype and so is the sample, while the parameters, sampling and
    KL stay in their own precision.

    Args:
        x: (..., in_features), any leading dimensions, dtype of the parameters.
        weight_mu, weight_rho: (out_features, in_features).
        bias_mu, bias_rho: (out_features,), both or neither.
        weight_prior: None (default: no KL is computed) or (prior_mu, prior_sigma), each a number or a tensor that
            broadcasts to the weight's shape; prior_sigma > 0, neither requiring grad.
        bias_prior: likewise for the bias; given if and only if there is a bias and a `weight_prior`.
        with_kl: False leaves the KL out although there is a prior (default True).
        seed: an int or a 0-d int64 tensor; default a fresh one from torch's generator.
        sample: index of the Monte Carlo sample, an int in [0, 2**32) or a 0-d int64 tensor; default 0.
        weight_address, bias_address: stream and shard offsets of the noise. zeta, r and s have the weight's stream plus
            2, 3 and 4, the row of x within its sample, and the weight's row or column.
        num_samples: Monte Carlo samples (default 1): the first dimension of x holds as many batches one after another,
            of which number s, from 0 on, is drawn as if it came alone with index `sample` + s. mu and rho are read
            once for all.
        same_input: x is one batch, and stands for num_samples equal ones (default False).
        estimator: "shared" (default), "local" or "flipout".

    Returns:
        (y, kl): y of shape (..., out_features) and x's dtype, with `same_input` num_samples times as long along the
        first dimension as x; kl, the sum over weight and bias, 0-d float32 (float64
        for float64 parameters), or None if it is not computed.

    Raises:
        TypeError: an argument is not of a type given above, or dtypes differ.
        ValueError: shapes or devices do not fit, prior_sigma as a number is not positive, an address is out of range,
            the estimator is none of those, or num_samples does not divide the first dimension of x.
    """
    x = check_linear(x, weight_mu, weight_rho, bias_mu, bias_rho)
    if weight_prior is not None and (bias_prior is None) != (bias_mu is None):
        raise ValueError("bias_prior must be given exactly when there is a bias and a weight_prior")
    if weight_prior is None and bias_prior is not None:
        raise ValueError("bias_prior is given without weight_prior: the KL needs both")
    check_address(weight_address, "weight_address", *weight_mu.shape)
    if bias_mu is not None:
        check_address(bias_address, "bias_address", 1, bias_mu.numel())
    check_estimator(estimator)
    if type(num_samples) is not int or num_samples != 1:
        check_samples(num_samples, x, sample, same_input)
    if estimator != "shared":
        # The streams of zeta, r and s.
        check_coordinates(0, 0, stream=weight_address.stream + Role.FLIPOUT_OUTPUT)
    weight_priors = (None, None) if weight_prior is None else fused_prior(weight_mu, weight_prior, "weight_")
    bias_priors: tuple[Tensor | None, Tensor | None] = (None, None)
    if bias_mu is not None and bias_prior is not None:
        bias_priors = fused_prior(bias_mu, bias_prior, "bias_")
    weight, bias = (weight_mu, weight_rho, *weight_priors), (bias_mu, bias_rho, *bias_priors)
    with_kl = with_kl and weight_prior is not None
    noise = (*seed_and_sample(seed, sample, x.device), weight_address, bias_address)
    # A matrix goes through as it is: views cost as much as a small layer, forward and backward.
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y, kl, _ = ops.bayes_linear(rows, *weight, *bias, *noise, num_samples, same_input, estimator, with_kl)
    if x.dim() != 2:
        repeats = num_samples > 1 and same_input
        leading = (num_samples * x.shape[0], *x.shape[1:-1]) if repeats else x.shape[:-1]
        y = y.view(*leading, weight_mu.shape[0])
    return y, kl if with_kl else None

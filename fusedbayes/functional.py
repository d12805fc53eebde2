"""Stateless functions: they validate, draw the seed and call the operators.

Shapes, dtypes and errors are documented here once; `fusedbayes.nn` holds the parameters. Everywhere ``sigma`` is a
standard deviation and ``sigma = softplus(rho)``.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from fusedbayes import ops, reference
from fusedbayes.checks import check_count, check_number, describe
from fusedbayes.noise import Address, Role, as_sample, as_seed, check_coordinates, draw_seed
from fusedbayes.reference import ESTIMATORS, Estimator

Prior = tuple[float | Tensor, float | Tensor]


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
        log_sigma = 0.5 * _like(mu, log_var, "log_var").to(reference.compute_dtype(mu))
        sigma = log_sigma.exp()
    assert sigma is not None
    sigma = _like(mu, sigma, "sigma", positive=True)
    kl = reference.gaussian_kl(mu, sigma, *_prior_tensors(mu, (prior_mu, prior_sigma), ""), log_sigma)
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
    _check_parameter(mu, rho, "")
    return ops.weight_kl(*(_matrix(t) for t in (mu, rho, *_fused_prior(mu, prior, ""))))


def sample_weight(
    mu: Tensor,
    rho: Tensor,
    *,
    prior: Prior | None = None,
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
        prior: None (default: no KL is computed) or (prior_mu, prior_sigma), each a number or a tensor, 0-d or of mu's
            shape; prior_sigma > 0.
        seed: an int or a 0-d int64 tensor; default a fresh one from torch's generator.
        sample: index of the Monte Carlo sample, an int in [0, 2**32) or a 0-d int64 tensor; default 0.
        address: stream and shard offsets of the noise.
        dtype: of the sample; default mu's. Arithmetic is float32 (float64 for float64 parameters) in any case.

    Returns:
        (w, kl): w of mu's shape and `dtype`; kl 0-d float32 (float64 for float64 parameters), or None without a prior.

    Raises:
        TypeError: an argument is not of a type given above, or mu and rho differ in dtype.
        ValueError: shapes or devices differ, prior_sigma as a number is not positive, or the address is out of range.
    """
    _check_parameter(mu, rho, "")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {describe(dtype)}")
    _check_address(address, "address", *reference.matrix_shape(mu))
    priors = () if prior is None else _fused_prior(mu, prior, "")
    mu_2d, rho_2d, *priors_2d = (_matrix(t) for t in (mu, rho, *priors))
    noise = (*_seed_and_sample(seed, sample, mu.device), address)
    weight, kl = ops.sample_weight(
        mu_2d, rho_2d, *(priors_2d or (None, None)), *noise, dtype or mu.dtype, prior is not None
    )
    return weight.view(mu.shape), None if prior is None else kl


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
    """Y = x W^T + b with W ~ N(weight_mu, softplus(weight_rho)^2), likewise b, and the KL of both.

    Estimators (docs/estimators.md says which to choose when):

    - "shared": one W and b for the whole batch (Blundell et al., "Weight uncertainty in neural networks", ICML 2015,
      equations 1 to 4).
    - "local": each row's outputs are drawn from their distribution, y = x mu^T + b_mu + sqrt(x^2 (sigma^2)^T +
      sigma_b^2) * zeta (Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
      NeurIPS 2015, equation 6).
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
        (y, kl): y of shape (..., out_features) and x's dtype; kl, the sum over weight and bias, 0-d float32 (float64
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
    _check_address(weight_address, "weight_address", *weight_mu.shape)
    if bias_mu is not None:
        _check_address(bias_address, "bias_address", 1, bias_mu.numel())
    check_estimator(estimator)
    if num_samples != 1:
        _check_samples(num_samples, x, same_input)
    if estimator != "shared":
        # The streams of zeta, r and s.
        check_coordinates(0, 0, stream=weight_address.stream + Role.FLIPOUT_OUTPUT)
    weight_priors = (None, None) if weight_prior is None else _fused_prior(weight_mu, weight_prior, "weight_")
    bias_priors: tuple[Tensor | None, Tensor | None] = (None, None)
    if bias_mu is not None and bias_prior is not None:
        bias_priors = _fused_prior(bias_mu, bias_prior, "bias_")
    weight, bias = (weight_mu, weight_rho, *weight_priors), (bias_mu, bias_rho, *bias_priors)
    with_kl = with_kl and weight_prior is not None
    noise = (*_seed_and_sample(seed, sample, x.device), weight_address, bias_address)
    # A matrix goes through as it is: views cost as much as a small layer, forward and backward.
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y, kl, _ = ops.bayes_linear(rows, *weight, *bias, *noise, num_samples, same_input, estimator, with_kl)
    if x.dim() != 2:
        leading = (num_samples * x.shape[0], *x.shape[1:-1]) if same_input else x.shape[:-1]
        y = y.view(*leading, weight_mu.shape[0])
    return y, kl if with_kl else None


def _seed_and_sample(
    seed: int | Tensor | None, sample: int | Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Seed and sample as the operators take them. The last thing to do: a call that raises has drawn no seed."""
    sample = None if sample is None else as_sample(sample, device)
    return draw_seed(device) if seed is None else as_seed(seed, device), sample


def check_estimator(estimator: str) -> None:
    """Raises ValueError unless there is such an estimator."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, ESTIMATORS))}, got {estimator!r}")


def _check_samples(num_samples: int, x: Tensor, same_input: bool) -> None:
    check_count(num_samples, "num_samples")
    if x.dim() < 2 or (not same_input and x.shape[0] % num_samples != 0):
        raise ValueError(
            f"num_samples is {num_samples}, so the first dimension of x must hold as many batches one after another, "
            f"a multiple of {num_samples}, got shape {tuple(x.shape)}"
        )


def _matrix(tensor: Tensor) -> Tensor:
    """2-D view for the operators; a scalar prior stays 0-d."""
    return tensor if tensor.dim() in (0, 2) else tensor.reshape(reference.matrix_shape(tensor))


def _check_address(address: Address, name: str, rows: int, columns: int) -> None:
    if not isinstance(address, Address):
        raise TypeError(f"{name} must be a fusedbayes.noise.Address, got {describe(address)}")
    stream, row_offset, column_offset = address
    check_coordinates(rows, columns, stream=stream, row_offset=row_offset, column_offset=column_offset)


def _like(mu: Tensor, value: float | Tensor, name: str, *, positive: bool = False) -> Tensor:
    """`value` as a tensor on mu's device that broadcasts to mu's shape."""
    if not isinstance(value, Tensor):
        value = check_number(value, name, positive=positive)
        # Filled on the device, not copied to it: a copy would wait for the device.
        return torch.full((), value, dtype=reference.compute_dtype(mu), device=mu.device)
    if value.device != mu.device:
        raise ValueError(f"{name} must be on the device of mu, {mu.device}, got {value.device}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {value.dtype}")
    if value.dim() == 0 or value.shape == mu.shape:
        return value  # at once: torch.broadcast_shapes takes longer than a small layer
    try:
        fits = torch.broadcast_shapes(value.shape, mu.shape) == mu.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to the shape of mu, {tuple(mu.shape)}, got {tuple(value.shape)}")
    return value


def _prior_tensors(mu: Tensor, prior: Prior, prefix: str) -> tuple[Tensor, Tensor]:
    """The prior as tensors that broadcast to mu's shape."""
    if not isinstance(prior, tuple) or len(prior) != 2:
        raise TypeError(f"{prefix}prior must be a tuple (prior_mu, prior_sigma), got {prior!r}")
    prior_mu = _like(mu, prior[0], f"{prefix}prior_mu")
    prior_sigma = _like(mu, prior[1], f"{prefix}prior_sigma", positive=True)
    return prior_mu, prior_sigma


def _fused_prior(mu: Tensor, prior: Prior, prefix: str) -> tuple[Tensor, Tensor]:
    """The prior as the operators take it: each tensor 0-d or of mu's shape."""
    prior_mu, prior_sigma = _prior_tensors(mu, prior, prefix)
    if prior_mu.requires_grad or prior_sigma.requires_grad:
        raise ValueError(
            f"{prefix}prior requires grad, but the fused KL has no gradient for the prior: "
            "use gaussian_kl(mu, sigma=..., prior_mu=..., prior_sigma=...) for a prior that is learnt"
        )
    return _as_operand(prior_mu, mu), _as_operand(prior_sigma, mu)


def _as_operand(prior: Tensor, mu: Tensor) -> Tensor:
    if prior.dtype == torch.float64:
        # A prior that NumPy made does not make float32 parameters worth float64 arithmetic.
        prior = prior.to(reference.compute_dtype(mu))
    return prior if prior.dim() == 0 else prior.expand(mu.shape)


def _check_parameter(mu: Tensor, rho: Tensor, prefix: str) -> None:
    for name, value in ((f"{prefix}mu", mu), (f"{prefix}rho", rho)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}")
    if rho.dtype != mu.dtype:
        raise TypeError(f"{prefix}rho must have the dtype of {prefix}mu, {mu.dtype}, got {rho.dtype}")
    if rho.shape != mu.shape:
        raise ValueError(f"{prefix}rho must have the shape of {prefix}mu, {tuple(mu.shape)}, got {tuple(rho.shape)}")
    if rho.device != mu.device:
        raise ValueError(f"{prefix}rho must be on the device of {prefix}mu, {mu.device}, got {rho.device}")


def check_linear(
    x: Tensor, weight_mu: Tensor, weight_rho: Tensor, bias_mu: Tensor | None, bias_rho: Tensor | None
) -> Tensor:
    """Validates the tensors of `bayes_linear`; returns x, cast as autocast asks."""
    _check_parameter(weight_mu, weight_rho, "weight_")
    if weight_mu.dim() != 2:
        raise ValueError(f"weight_mu must have shape (out_features, in_features), got {tuple(weight_mu.shape)}")
    if (bias_mu is None) != (bias_rho is None):
        raise ValueError("bias_mu and bias_rho must be given together or not at all")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {describe(x)}")
    if x.dim() == 0 or x.shape[-1] != weight_mu.shape[1]:
        raise ValueError(f"x must have shape (..., {weight_mu.shape[1]}) = (..., in_features), got {tuple(x.shape)}")
    if x.device != weight_mu.device:
        raise ValueError(f"x must be on the device of weight_mu, {weight_mu.device}, got {x.device}")
    if bias_mu is not None and bias_rho is not None:
        _check_parameter(bias_mu, bias_rho, "bias_")
        if bias_mu.shape != weight_mu.shape[:1]:
            raise ValueError(f"bias_mu must have shape ({weight_mu.shape[0]},), got {tuple(bias_mu.shape)}")
        if bias_mu.dtype != weight_mu.dtype:
            raise TypeError(f"bias_mu must have the dtype of weight_mu, {weight_mu.dtype}, got {bias_mu.dtype}")
        if bias_mu.device != weight_mu.device:
            raise ValueError(f"bias_mu must be on the device of weight_mu, {weight_mu.device}, got {bias_mu.device}")
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    if x.dtype != weight_mu.dtype:
        raise TypeError(f"x must have the dtype of weight_mu, {weight_mu.dtype}, outside autocast, got {x.dtype}")
    return x

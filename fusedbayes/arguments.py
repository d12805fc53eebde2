"""How the arguments of `fusedbayes.functional` are checked, and become those of the operators."""

from typing import TypeGuard

import torch
from torch import Tensor

from fusedbayes import reference
from fusedbayes.checks import check_count, check_number, describe
from fusedbayes.noise import Address, as_sample, as_seed, check_coordinates, draw_seed
from fusedbayes.reference import ESTIMATORS, Estimator

Prior = tuple[float | Tensor, float | Tensor]


def seed_and_sample(
    seed: int | Tensor | None, sample: int | Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Seed and sample as the operators take them. The last thing to do: a call that raises has drawn no seed."""
    sample = None if sample is None else as_sample(sample, device)
    return draw_seed(device) if seed is None else as_seed(seed, device), sample


def check_estimator(estimator: str, known: tuple[Estimator, ...] = ESTIMATORS) -> None:
    """Raises ValueError unless the estimator is one of those that are known."""
    if estimator not in known:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, known))}, got {estimator!r}")


def check_samples(num_samples: int, x: Tensor, sample: int | Tensor | None, same_input: bool) -> None:
    """Raises TypeError or ValueError unless x has rows for so many Monte Carlo samples from `sample` on."""
    if check_count(num_samples, "num_samples") > 1 and x.dim() < 2:
        raise ValueError(f"with num_samples of {num_samples}, x must have rows, got shape {tuple(x.shape)}")
    if x.dim() > 1 and not same_input and x.shape[0] % num_samples != 0:
        raise ValueError(
            f"num_samples is {num_samples}, so the first dimension of x must hold as many batches one after another, "
            f"a multiple of {num_samples}, got shape {tuple(x.shape)}"
        )
    if isinstance(sample, int) and sample + num_samples > 2**32:
        raise ValueError(f"sample + num_samples must not exceed 2**32, got {sample} + {num_samples}")


def as_matrix(tensor: Tensor) -> Tensor:
    """2-D view for the operators; a scalar prior stays 0-d."""
    return tensor if tensor.dim() in (0, 2) else tensor.reshape(reference.matrix_shape(tensor))


def check_address(address: Address, name: str, rows: int, columns: int) -> None:
    if not isinstance(address, Address):
        raise TypeError(f"{name} must be a fusedbayes.noise.Address, got {describe(address)}")
    stream, row_offset, column_offset = address
    check_coordinates(rows, columns, stream=stream, row_offset=row_offset, column_offset=column_offset)


def like(mu: Tensor, value: float | Tensor, name: str, *, positive: bool = False) -> Tensor:
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


def prior_tensors(mu: Tensor, prior: Prior, prefix: str) -> tuple[Tensor, Tensor]:
    """The prior as tensors that broadcast to mu's shape."""
    if not isinstance(prior, tuple) or len(prior) != 2:
        raise TypeError(f"{prefix}prior must be a tuple (prior_mu, prior_sigma), got {prior!r}")
    prior_mu = like(mu, prior[0], f"{prefix}prior_mu")
    prior_sigma = like(mu, prior[1], f"{prefix}prior_sigma", positive=True)
    return prior_mu, prior_sigma


def fused_prior(mu: Tensor, prior: Prior, prefix: str) -> tuple[Tensor, Tensor]:
    """The prior as the operators take it: each tensor 0-d or of mu's shape."""
    if type(prior) is tuple and len(prior) == 2:
        prior_mu, prior_sigma = prior
        if _is_scalar_operand(prior_mu, mu.device) and _is_scalar_operand(prior_sigma, mu.device):
            return prior_mu, prior_sigma
    prior_mu, prior_sigma = prior_tensors(mu, prior, prefix)
    if prior_mu.requires_grad or prior_sigma.requires_grad:
        raise ValueError(
            f"{prefix}prior requires grad, but the fused KL has no gradient for the prior: "
            "use gaussian_kl(mu, sigma=..., prior_mu=..., prior_sigma=...) for a prior that is learnt"
        )
    return _as_operand(prior_mu, mu), _as_operand(prior_sigma, mu)


def _is_scalar_operand(value: float | Tensor, device: torch.device) -> TypeGuard[Tensor]:
    """Whether `like` and `_as_operand` would return this as it is: for what nearly every layer's prior is, at once."""
    return (
        type(value) is Tensor
        and value.dtype is torch.float32
        and value.dim() == 0
        and not value.requires_grad
        and value.device == device
    )


# Bounds of a scale mixture's deviations: their squares and the squares of their inverses fit float32.
SMALLEST_SCALE, LARGEST_SCALE = 1e-15, 1e15


def check_share(value: float, name: str) -> None:
    """Raises TypeError or ValueError unless the number is between 0 and 1, and neither in float32."""
    check_number(value, name)
    if not 0.0 < torch.tensor(value, dtype=torch.float32, device="cpu").item() < 1.0:
        raise ValueError(f"{name} must lie between 0 and 1 in float32, got {value}")


def check_scale(value: float, name: str) -> None:
    """Raises TypeError or ValueError unless the number is a standard deviation that a scale mixture may have."""
    if not SMALLEST_SCALE <= check_number(value, name, positive=True) <= LARGEST_SCALE:
        raise ValueError(f"{name} must lie in [{SMALLEST_SCALE:g}, {LARGEST_SCALE:g}], got {value}")


def scale_mixture_number(mu: Tensor, name: str, value: float | Tensor) -> Tensor:
    """A scale mixture's pi, sigma_1 or sigma_2 as the operators take it: 0-d, of the dtype of arithmetic."""
    if not isinstance(value, Tensor):
        (check_share if name == "pi" else check_scale)(value, name)
    tensor = like(mu, value, name)
    if tensor.dim() != 0 or tensor.requires_grad:
        grad = " that requires grad" if tensor.requires_grad else ""
        raise ValueError(
            f"{name} must be a number or a 0-d tensor without grad, got {describe(tensor)}{grad}: a mixture that is "
            "learnt, or differs by weight, takes weight_kl_estimate"
        )
    return tensor.to(reference.compute_dtype(mu))


def _as_operand(prior: Tensor, mu: Tensor) -> Tensor:
    if prior.dtype == torch.float64:
        # A prior that NumPy made does not make float32 parameters worth float64 arithmetic.
        prior = prior.to(reference.compute_dtype(mu))
    return prior if prior.dim() == 0 else prior.expand(mu.shape)


def check_parameter(mu: Tensor, rho: Tensor, prefix: str) -> None:
    both = isinstance(mu, Tensor) and isinstance(rho, Tensor) and mu.is_floating_point()
    if both and rho.dtype == mu.dtype and rho.shape == mu.shape and rho.device == mu.device:
        return  # as nearly always, and in every forward
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
    check_parameter(weight_mu, weight_rho, "weight_")
    shape, dtype, device = weight_mu.shape, weight_mu.dtype, weight_mu.device
    if len(shape) != 2:
        raise ValueError(f"weight_mu must have shape (out_features, in_features), got {tuple(shape)}")
    if (bias_mu is None) != (bias_rho is None):
        raise ValueError("bias_mu and bias_rho must be given together or not at all")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {describe(x)}")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x must have shape (..., {shape[1]}) = (..., in_features), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"x must be on the device of weight_mu, {device}, got {x.device}")
    if bias_mu is not None and bias_rho is not None:
        check_parameter(bias_mu, bias_rho, "bias_")
        if bias_mu.shape != (shape[0],):
            raise ValueError(f"bias_mu must have shape ({shape[0]},), got {tuple(bias_mu.shape)}")
        if bias_mu.dtype != dtype:
            raise TypeError(f"bias_mu must have the dtype of weight_mu, {dtype}, got {bias_mu.dtype}")
        if bias_mu.device != device:
            raise ValueError(f"bias_mu must be on the device of weight_mu, {device}, got {bias_mu.device}")
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    if x.dtype != dtype:
        raise TypeError(f"x must have the dtype of weight_mu, {dtype}, outside autocast, got {x.dtype}")
    return x

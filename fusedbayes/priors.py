"""Priors of the weights: what the KL of the posterior is taken from. docs/priors.md says which to choose when.

Everywhere ``sigma`` is a standard deviation.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedbayes import functional, reference
from fusedbayes.arguments import check_parameter, check_scale, check_share
from fusedbayes.checks import check_number, describe
from fusedbayes.noise import Address
from fusedbayes.recompute import recomputed


class Prior(nn.Module):
    """Base class of the priors, and how to write one: a module that overrides `kl` or `log_prob`.

    A layer has one for each of its random tensors, a copy of what it was given, as its child ``{name}_prior``: buffers
    and parameters are in the state_dict, and parameters are trained with the model. `kl` and `log_prob` are plain
    PyTorch, computed again in the backward pass, so that nothing of the weight's size is kept for it. Both get float32
    tensors (float64 for float64 parameters) of the weight's shape; or some of its rows, where a layer does not draw
    them all and no tensor of the prior has a dimension.
    """

    is_analytic: ClassVar[bool] = False  # whether the KL is `kl`, and not an estimate by `log_prob`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The class that overrides one of them last decides; kl, if it overrides both.
        decisive = next(base for base in cls.__mro__ if not {"kl", "log_prob"}.isdisjoint(vars(base)))
        cls.is_analytic = decisive is not Prior and "kl" in vars(decisive)

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        """KL(N(mu, sigma^2) || prior) in nats, element by element: of mu's shape.

        Where this is not overridden, `log_prob` gives an estimate.
        """
        raise NotImplementedError(f"{type(self).__name__} has no KL in closed form: estimate it by weight_kl")

    def log_prob(self, w: Tensor) -> Tensor:
        """Logarithm of the prior's density at `w`, element by element: of w's shape.

        With it the KL is the estimate of one sample, log q(w) - log p(w) with w drawn from the posterior (Blundell et
        al., "Weight uncertainty in neural networks", ICML 2015, equation 2). A constant may be left out, which shifts
        the KL and leaves its gradients alone.
        """
        raise NotImplementedError(f"{type(self).__name__} must override kl(mu, sigma) or log_prob(w)")

    def weight_kl(
        self,
        mu: Tensor,
        rho: Tensor,
        *,
        seed: int | Tensor | None = None,
        sample: int | Tensor | None = None,
        address: Address = Address(),
    ) -> Tensor:
        """The KL of the weights N(mu, softplus(rho)^2), summed: what a layer calls.

        Args:
            mu, rho: same shape, floating dtype and device.
            seed, sample, address: of the noise, as for `fusedbayes.functional.weight_kl_estimate`. Not read by a prior
                whose KL needs no sample.

        Returns:
            0-d float32 (float64 for float64 parameters), in nats, differentiable in mu, rho and the prior's parameters.

        Raises:
            TypeError, ValueError: as `weight_kl_estimate`; `kl` does not return a tensor of mu's shape.
        """
        if not self.is_analytic:
            return functional.weight_kl_estimate(mu, rho, self.log_prob, seed=seed, sample=sample, address=address)
        check_parameter(mu, rho, "")
        return recomputed(lambda mu, rho: self.kl_of_each(mu, rho).sum(), mu, rho)

    def kl_of_each(self, mu: Tensor, rho: Tensor) -> Tensor:
        """`kl` of the weights N(mu, softplus(rho)^2), in the precision of arithmetic; ValueError for another shape."""
        dtype = reference.compute_dtype(mu)
        kl = self.kl(mu.to(dtype), reference.sigma_from_rho(rho.to(dtype)))
        if not isinstance(kl, Tensor) or kl.shape != mu.shape:
            raise ValueError(
                f"kl of {type(self).__name__} must return a tensor of mu's shape {tuple(mu.shape)}, got {describe(kl)}"
            )
        return kl.to(dtype)

    def check_fits(self, mu: Tensor) -> None:
        """Raises ValueError unless this may be the prior of a tensor like `mu`; a layer asks before it takes it."""

    def extra_repr(self) -> str:
        def shown(tensor: Tensor) -> str:
            if tensor.is_meta:
                return "meta"
            return f"{tensor.item():.4g}" if tensor.dim() == 0 else "per weight"

        held = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        return ", ".join(f"{name}={shown(tensor)}" for name, tensor in held)


class Normal(Prior):
    """N(mu, sigma^2), the prior whose KL comes with the forward pass for nothing.

    A layer holds it as its buffers ``{name}_prior_mu`` and ``{name}_prior_sigma``.

    Args:
        mu: the mean, a number or a tensor of the weight's shape (default 0).
        sigma: its standard deviation, likewise, > 0 (default 1).

    Raises:
        TypeError: neither a number nor a floating-point tensor.
        ValueError: a number that is not finite, or a sigma that is not positive.
    """

    mu: Tensor
    sigma: Tensor

    def __init__(self, mu: float | Tensor = 0.0, sigma: float | Tensor = 1.0) -> None:
        super().__init__()
        self.register_buffer("mu", _hyperparameter(mu, "mu"))
        self.register_buffer("sigma", _hyperparameter(sigma, "sigma", positive=True))

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        return reference.gaussian_kl(mu, sigma, self.mu, self.sigma)

    def log_prob(self, w: Tensor) -> Tensor:
        return reference.normal_log_prob((w - self.mu) / self.sigma, self.sigma.log())

    def weight_kl(self, mu: Tensor, rho: Tensor, **noise: Any) -> Tensor:
        if type(self) is not Normal:  # but one that overrides kl or log_prob
            return super().weight_kl(mu, rho, **noise)
        return functional.weight_kl(mu, rho, (self.mu, self.sigma))

    def check_fits(self, mu: Tensor) -> None:
        _check_shapes(mu, {"mu": self.mu, "sigma": self.sigma})


class LearnedNormal(Prior):
    """N(mu, sigma^2) with a sigma that is learnt with the model: empirical Bayes, one scale for each random tensor.

    The KL is least where sigma^2 is the mean of sigma_w^2 + (mu_w - mu)^2 over the weights (docs/math.md). Source:
    MacKay, "A practical Bayesian framework for backpropagation networks", Neural Computation 4, 1992, whose evidence
    sets the same scale.

    Args:
        mu: the mean, a number, which is not learnt (default 0).
        sigma: standard deviation to begin with, > 0 (default 1).

    Attributes:
        log_sigma: 0-d parameter. Make the optimizer afterwards, and leave weight decay off for it.

    Raises:
        TypeError: not a number.
        ValueError: not finite, or a sigma that is not positive.
    """

    mu: Tensor

    def __init__(self, mu: float = 0.0, sigma: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mu", _number(mu, "mu"))
        self.log_sigma = nn.Parameter(_number(sigma, "sigma", positive=True).log())

    @property
    def sigma(self) -> Tensor:
        """The standard deviation, 0-d."""
        return self.log_sigma.exp()

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        return reference.gaussian_kl(mu, sigma, self.mu, self.sigma)

    def log_prob(self, w: Tensor) -> Tensor:
        return reference.normal_log_prob((w - self.mu) / self.sigma, self.log_sigma)

    def weight_kl(self, mu: Tensor, rho: Tensor, **noise: Any) -> Tensor:
        if type(self) is not LearnedNormal:  # but one that overrides kl or log_prob
            return super().weight_kl(mu, rho, **noise)
        # Two fused passes, whose priors have no gradients. The KL is K(s) = n log s + S / (2 s^2) and what s is not in:
        # K(2 s) - K(s) = n log 2 - 3 S / (8 s^2) gives S; and with r = sigma / s, K(sigma) = K(s) + n log r +
        # (1 / r^2 - 1) S / (2 s^2) whatever s is. It is sigma itself: of the other terms only the derivatives are left.
        log_s = self.log_sigma.detach()
        kl, wider = (functional.weight_kl(mu, rho, (self.mu, factor * log_s.exp())) for factor in (1.0, 2.0))
        squares = 8.0 / 3.0 * (mu.numel() * math.log(2.0) - (wider - kl))
        log_r = self.log_sigma - log_s
        return kl + mu.numel() * log_r + 0.5 * squares * torch.expm1(-2.0 * log_r)

    def extra_repr(self) -> str:
        return "meta" if self.mu.is_meta else f"mu={self.mu.item():.4g}, sigma={self.sigma.item():.4g}"


class Laplace(Prior):
    """The density exp(-|w - mu| / scale) / (2 scale): most weights near mu, some far away.

    Its KL from a Gaussian is known in closed form (docs/math.md). The scale is the mean distance from mu; the standard
    deviation is sqrt(2) times as large.

    Args:
        mu: the centre, a number or a tensor of the weight's shape (default 0).
        scale: likewise, > 0 (default 1).

    Raises:
        TypeError: neither a number nor a floating-point tensor.
        ValueError: a number that is not finite, or a scale that is not positive.
    """

    mu: Tensor
    scale: Tensor

    def __init__(self, mu: float | Tensor = 0.0, scale: float | Tensor = 1.0) -> None:
        super().__init__()
        self.register_buffer("mu", _hyperparameter(mu, "mu"))
        self.register_buffer("scale", _hyperparameter(scale, "scale", positive=True))

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        distance = _mean_distance(mu - self.mu, sigma) / self.scale
        return self.scale.log() - sigma.log() + 0.5 * (math.log(2.0 / math.pi) - 1.0) + distance

    def log_prob(self, w: Tensor) -> Tensor:
        return -(w - self.mu).abs() / self.scale - (2.0 * self.scale).log()

    def check_fits(self, mu: Tensor) -> None:
        _check_shapes(mu, {"mu": self.mu, "scale": self.scale})


class ScaleMixture(Prior):
    """pi N(0, sigma_1^2) + (1 - pi) N(0, sigma_2^2): a wide Normal for some weights, a narrow one for the others.

    The KL is the estimate of one sample in log space, by a fused pass. Source: Blundell et al., "Weight uncertainty in
    neural networks", ICML 2015, equation 7, where sigma_1 > sigma_2; here either may be the larger.

    Args:
        pi: share of the first, between 0 and 1 (default 0.5).
        sigma_1, sigma_2: standard deviations, between 1e-15 and 1e15 (defaults exp(-1) and exp(-7), of the ranges that
            Blundell et al. searched).

    Raises:
        TypeError: not a number.
        ValueError: not within these bounds.
    """

    pi: Tensor
    sigma_1: Tensor
    sigma_2: Tensor

    def __init__(self, pi: float = 0.5, sigma_1: float = math.exp(-1.0), sigma_2: float = math.exp(-7.0)) -> None:
        super().__init__()
        check_share(pi, "pi")
        self.register_buffer("pi", _number(pi, "pi"))
        for name, value in (("sigma_1", sigma_1), ("sigma_2", sigma_2)):
            check_scale(value, name)
            self.register_buffer(name, _number(value, name))

    def log_prob(self, w: Tensor) -> Tensor:
        return reference.scale_mixture_log_prob(w, self.pi, self.sigma_1, self.sigma_2)

    def weight_kl(self, mu: Tensor, rho: Tensor, **noise: Any) -> Tensor:
        if type(self) is not ScaleMixture:  # but one that overrides kl or log_prob
            return super().weight_kl(mu, rho, **noise)
        return functional.scale_mixture_kl(mu, rho, pi=self.pi, sigma_1=self.sigma_1, sigma_2=self.sigma_2, **noise)


def _mean_distance(shift: Tensor, sigma: Tensor) -> Tensor:
    """E|x| of x ~ N(shift, sigma^2): sigma sqrt(2 / pi) exp(-z^2 / 2) + shift erf(z / sqrt 2), z = shift / sigma."""
    # Beyond 9 sigma it is |shift|, in double precision too: exp(-z^2 / 2) is 3e-18. There, and for the least sigma, z's
    # derivatives overflow; further off the exponential underflows, which takes a CPU long.
    far = shift.abs() > 9.0 * sigma
    z = shift.masked_fill(far, 0.0) / sigma.clamp(min=1e-18)
    mean = math.sqrt(2.0 / math.pi) * sigma * torch.exp(-0.5 * z.square()) + shift * torch.erf(math.sqrt(0.5) * z)
    return torch.where(far, shift.abs(), mean)


def _check_shapes(weight: Tensor, hyperparameters: dict[str, Tensor]) -> None:
    for name, value in hyperparameters.items():
        if value.shape not in ((), weight.shape):
            raise ValueError(f"prior's {name} must have shape () or {tuple(weight.shape)}, got {tuple(value.shape)}")


def _number(value: float, name: str, *, positive: bool = False) -> Tensor:
    # In double precision until a layer takes it, whose precision is then its own.
    return torch.tensor(check_number(value, name, positive=positive), dtype=torch.float64, device="cpu")


def _hyperparameter(value: float | Tensor, name: str, *, positive: bool = False) -> Tensor:
    """A copy, which does not follow what it was made of."""
    if not isinstance(value, Tensor):
        return _number(value, name, positive=positive)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating-point tensor, got {describe(value)}")
    if not value.is_meta and not (torch.isfinite(value) & ((value > 0.0) | (not positive))).all():
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''}, got {value}")
    return value.detach().clone()

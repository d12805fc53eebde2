"""The random tensors of a layer and their priors: where they are held, how they are set, what their KL is."""

import copy
import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedbayes import functional
from fusedbayes.checks import check_number, describe
from fusedbayes.nn.pruned import PRUNED_RHO, PriorOfTheRest, PrunedTensors, normal_of
from fusedbayes.priors import Normal, Prior
from fusedbayes.reference import GaussianParameter


class RandomTensors(PrunedTensors):
    """A module that holds ``{name}_mu`` and ``{name}_rho`` for each of `random_tensors`, and a prior.

    A Normal prior is the buffers ``{name}_prior_mu`` and ``{name}_prior_sigma``, 0-d or of the tensor's shape; any
    other is the child module ``{name}_prior``, a copy of the `fusedbayes.priors.Prior` that was given. Which weights
    are pruned says the buffer ``{name}_pruned``, where any were.

    Attributes:
        random_tensors: their names, those of absent ones (a bias that there is none of) among them.
        prior_mu, prior_sigma: of the constructor's Normal prior, for `reset_parameters`.
    """

    random_tensors: tuple[str, ...]
    prior_mu: float
    prior_sigma: float
    _given_prior: tuple[Prior, ...]  # the constructor's, if it is not one Normal for all; in a tuple it is no child
    PRIOR_ATTRIBUTES: ClassVar[frozenset[str]] = frozenset({"prior_mu", "prior_sigma", "_given_prior"})

    def names(self) -> list[str]:
        """The random tensors that the layer has: without a bias, "bias" is not among them."""
        return [name for name in self.random_tensors if self._tensor(f"{name}_mu") is not None]

    def gaussian(self, name: str) -> GaussianParameter:
        """mu, rho, prior_mu and prior_sigma of the random tensor `name`; ValueError if its prior is not Normal."""
        return GaussianParameter(*self.posterior(name), *self.prior(name))

    def posterior(self, name: str) -> tuple[Tensor, Tensor]:
        """mu and rho of the random tensor `name`; of pruned weights those that `set_pruned` says, without gradients."""
        mu, rho, pruned = self._tensor(f"{name}_mu"), self._tensor(f"{name}_rho"), self.pruned(name)
        return (mu, rho) if pruned is None else (mu.masked_fill(pruned, 0.0), rho.masked_fill(pruned, PRUNED_RHO))

    def has_fused_kl(self) -> bool:
        """Whether a forward can give the KL: every prior is Normal and no weight is pruned."""
        return not self.prior_modules() and all(self.pruned(name) is None for name in self.random_tensors)

    def prior(self, name: str) -> tuple[Tensor, Tensor]:
        """prior_mu and prior_sigma of the random tensor `name`; ValueError if its prior is not Normal."""
        other = self._modules.get(f"{name}_prior") if self._modules else None
        if other is not None:
            kind = type(other).__name__
            raise ValueError(f"the prior of {name!r} is a {kind}, without prior_mu and prior_sigma: see prior_of")
        return self._tensor(f"{name}_prior_mu"), self._tensor(f"{name}_prior_sigma")

    def prior_of(self, name: str) -> Prior:
        """The prior of the random tensor `name`, with the tensors that the layer holds, not copies."""
        other = self.prior_modules().get(f"{name}_prior")
        if other is not None:
            return other
        return normal_of(*self.prior(name))

    def prior_modules(self) -> dict[str, Prior]:
        """The priors that are not Normal, by the name of the child module."""
        held = self._modules  # of most layers it is empty
        children = {f"{name}_prior": held.get(f"{name}_prior") for name in self.random_tensors} if held else {}
        return {name: child for name, child in children.items() if isinstance(child, Prior)}

    def held_names(self) -> set[str]:
        """Of the parameters and buffers that belong to the random tensors, absent ones among them."""
        others = self.prior_modules()
        return {
            f"{name}_{part}"
            for name in self.random_tensors
            for part in (
                *("mu", "rho"),
                *(() if f"{name}_prior" in others else ("prior_mu", "prior_sigma")),
                *(() if self.pruned(name) is None else ("pruned",)),
            )
        }

    def _tensor(self, attribute: str) -> Any:
        # From where torch.nn.Module keeps it: its own way there takes several times as long. A parametrized tensor is
        # not kept, but computed by a property.
        for held in (self._parameters, self._buffers):
            if attribute in held:
                return held[attribute]
        return getattr(self, attribute)

    def kl_loss(self) -> Tensor:
        """KL of the posterior from the prior, summed over the layer's parameters, each once; see `fusedbayes.kl_loss`.

        Returns:
            0-d float32 tensor (float64 for float64 parameters) in nats, differentiable.
        """
        # By the tensor: one that has two names in the layer is charged once.
        distinct = {id(self._parameters.get(f"{name}_mu", name)): name for name in self.names()}
        return torch.stack([self.kl_of(name) for name in distinct.values()]).sum()

    def kl_of(self, name: str) -> Tensor:
        """The KL of one random tensor, 0-d, pruned weights left out: of some priors an estimate, with fresh noise."""
        return self._kl_of_rows(name)

    def _kl_of_rows(self, name: str, *rows: slice) -> Tensor:
        """The KL of these rows of one random tensor, or of all: for a layer that does not draw them all."""
        mu, rho = self.posterior(name)
        prior, pruned = self.prior_modules().get(f"{name}_prior"), self.pruned(name)
        if prior is not None and rows and mu.shape in _shapes(prior):
            # It has a value for each weight and cannot be asked for some rows: the others count as pruned.
            left_out = torch.ones_like(mu, dtype=torch.bool)
            for kept in rows:
                left_out[kept] = False
            mu, rho = mu.masked_fill(left_out, 0.0), rho.masked_fill(left_out, PRUNED_RHO)
            pruned, rows = left_out if pruned is None else pruned | left_out, ()
        normal = self.prior(name) if prior is None else ()
        kls = []
        for part in rows or (None,):
            # What is 0-d holds for all rows.
            tensors = [t if part is None or t.dim() == 0 else t[part] for t in (mu, rho, *normal)]
            if pruned is not None:
                whole = normal_of(*tensors[2:]) if prior is None else prior
                rest = PriorOfTheRest(whole, pruned if part is None else pruned[part], rho)
                kls.append(rest.weight_kl(tensors[0], tensors[1]))
            elif prior is None:
                kls.append(functional.weight_kl(tensors[0], tensors[1], (tensors[2], tensors[3])))
            else:
                kls.append(prior.weight_kl(tensors[0], tensors[1]))
        return kls[0] if len(kls) == 1 else torch.stack(kls).sum()

    @torch.no_grad()
    def set_prior(self, mu: float | Tensor | Prior, sigma: float | Tensor | None = None, name: str = "weight") -> None:
        """Sets the prior of one random tensor, N(mu, sigma^2) or whichever, by copy.

        Layers with tied weights are charged with the prior of the first of them: set it there.

        Args:
            mu, sigma: numbers, or tensors of the parameter's shape; sigma is a standard deviation > 0. Or one
                `fusedbayes.priors.Prior` and no sigma, as in ``set_prior(Laplace(0.0, 0.1), name="bias")``. A prior
                with parameters has them trained: make the optimizer afterwards.
            name: of the random tensor, "weight" (default) or "bias".

        Raises:
            TypeError: `mu` or `sigma` is neither a number nor a floating-point tensor.
            ValueError: no such random tensor, a shape that is neither () nor the parameter's, or a sigma that is not
                positive and finite; a prior with a sigma besides.
        """
        if name not in self.names():
            raise ValueError(f"name must be one of {', '.join(map(repr, self.names()))}, got {name!r}")
        like, _ = self.posterior(name)
        if isinstance(mu, Prior):
            if sigma is not None:
                raise ValueError(f"a prior is given as it is, without sigma, got sigma={sigma}")
            given = mu
            if not isinstance(given, Normal) or type(given) is not Normal:
                self._hold_prior(name, given)
                return
            mu, sigma = given.mu, given.sigma
        for part, value, positive in (("prior_mu", mu, False), ("prior_sigma", sigma, True)):
            if not isinstance(value, Tensor):
                check_number(value, part, positive=positive)  # type: ignore[arg-type]
                continue
            check_values(value, part, like.shape, like.dtype, positive=positive)
        assert sigma is not None
        self._hold_normal(name, mu, sigma)

    def _hold_normal(self, name: str, mu: float | Tensor, sigma: float | Tensor) -> None:
        like, _ = self.posterior(name)
        check_fits(mu, "prior_mu", like.dtype, -torch.finfo(like.dtype).max)
        check_fits(sigma, "prior_sigma", like.dtype, torch.finfo(like.dtype).tiny)
        self._modules.pop(f"{name}_prior", None)
        for part, value in (("prior_mu", mu), ("prior_sigma", sigma)):
            # A copy: a prior that shared storage with mu would move with it. Never an inference tensor: training
            # could not save it for the backward pass.
            with torch.inference_mode(False):
                new = value.detach().to(like, copy=True) if isinstance(value, Tensor) else like.new_full((), value)
            self.register_buffer(f"{name}_{part}", new)

    def _hold_prior(self, name: str, prior: Prior) -> None:
        """Makes a copy of a prior that is not Normal the tensor's own, or sets what is there to its values."""
        like, _ = self.posterior(name)
        prior.check_fits(like)
        own = self._modules.get(f"{name}_prior")
        if type(own) is type(prior) and _shapes(own) == _shapes(prior):
            # In place, for the optimizer that has its parameters.
            for mine, theirs in zip(_tensors(own), _tensors(prior), strict=True):
                mine.copy_(theirs)
            return
        with torch.inference_mode(False):
            # Hyperparameters need not be as coarse as weights may be.
            own = copy.deepcopy(prior).to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        self._let_go_of_normal(name)
        self.add_module(f"{name}_prior", own)

    def _let_go_of_normal(self, name: str) -> None:
        for part in ("prior_mu", "prior_sigma"):
            self._buffers.pop(f"{name}_{part}", None)

    def _take_prior(self, prior: Prior | None, prior_mu: float, prior_sigma: float | None, default: float) -> None:
        """Remembers the constructor's prior; `default` is its sigma if none is given."""
        if prior is not None and not isinstance(prior, Prior):
            raise TypeError(f"prior must be a fusedbayes.priors.Prior, got {describe(prior)}")
        check_exclusive(prior, prior_mu, prior_sigma)
        if type(prior) is Normal and prior.mu.dim() == prior.sigma.dim() == 0:
            prior_mu, prior_sigma, prior = prior.mu.item(), prior.sigma.item(), None
        self.prior_mu = check_number(prior_mu, "prior_mu")
        self.prior_sigma = check_number(default if prior_sigma is None else prior_sigma, "prior_sigma", positive=True)
        self._given_prior = () if prior is None else (copy.deepcopy(prior),)

    def _reset_prior(self, name: str) -> None:
        if self._given_prior:
            self.set_prior(self._given_prior[0], name=name)
        else:
            self._hold_normal(name, self.prior_mu, self.prior_sigma)

    def share(self, name: str, other: "RandomTensors", other_name: str) -> None:
        """Has a random tensor, whose mean is another's already, take its sigma, prior and mask: the same objects."""
        setattr(self, f"{name}_rho", getattr(other, f"{other_name}_rho"))
        if (pruned := other.pruned(other_name)) is not None:
            self.register_buffer(f"{name}_pruned", pruned)
        prior = other.prior_modules().get(f"{other_name}_prior")
        if prior is not None:
            self._let_go_of_normal(name)
            self.add_module(f"{name}_prior", prior)
            return
        self._modules.pop(f"{name}_prior", None)
        for part in ("prior_mu", "prior_sigma"):
            self.register_buffer(f"{name}_{part}", getattr(other, f"{other_name}_{part}"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint may hold a scalar prior or one value per weight, and pruned weights or none; the buffers take the
        # checkpoint's form.
        others = self.prior_modules()
        for name in self.names():
            self._expect_mask(name, state_dict, prefix)
            for part in () if f"{name}_prior" in others else ("prior_mu", "prior_sigma"):
                saved, buffer = state_dict.get(f"{prefix}{name}_{part}"), getattr(self, f"{name}_{part}")
                shapes = ((), getattr(self, f"{name}_mu").shape)
                if isinstance(saved, Tensor) and saved.shape in shapes and saved.shape != buffer.shape:
                    with torch.inference_mode(False):
                        setattr(self, f"{name}_{part}", buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _prior_repr(self) -> str:
        """N(mu, sigma) of the first random tensor's prior, or that it is given per weight; others show as children."""
        name = self.names()[0]
        if f"{name}_prior" in self.prior_modules():
            return ""
        mu, sigma = self.prior(name)
        if mu.is_meta:
            return "prior=meta"
        values = [f"{t.item():.4g}" if t.dim() == 0 else "per weight" for t in (mu, sigma)]
        return f"prior_mu={values[0]}, prior_sigma={values[1]}"


def check_exclusive(prior: Prior | None, prior_mu: float, prior_sigma: float | None) -> None:
    """Raises ValueError if a prior is given twice."""
    if prior is not None and (prior_mu != 0.0 or prior_sigma is not None):
        raise ValueError(
            f"give either prior or prior_mu and prior_sigma, got prior={type(prior).__name__}, prior_mu={prior_mu} and "
            f"prior_sigma={prior_sigma}"
        )


def check_fits(value: float | Tensor, name: str, dtype: torch.dtype, least: float) -> None:
    """Raises ValueError unless the number `value` lies between `least` and the largest number of `dtype`."""
    most = torch.finfo(dtype).max
    if not isinstance(value, Tensor) and not least <= value <= most:
        raise ValueError(f"{name} must lie in [{least:.4g}, {most:.4g}] for {dtype}, got {value}")


def check_values(value: Tensor, name: str, shape: torch.Size, dtype: torch.dtype, *, positive: bool) -> None:
    """Raises TypeError or ValueError unless `value`, 0-d or of this shape, is finite (and positive) in `dtype`."""
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating-point tensor, got {describe(value)}")
    if value.shape not in ((), shape):
        raise ValueError(f"{name} must have shape () or {tuple(shape)}, got {tuple(value.shape)}")
    rounded = value.to(dtype)
    if not torch.isfinite(rounded).all() or (positive and not (rounded > 0).all()):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''} in {dtype}, got {value}")


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(itertools.chain(module.parameters(), module.buffers()))


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [tensor.shape for tensor in _tensors(module)]

"""The random tensors of a layer and their priors: where they are held, how they are set, what their KL is."""

import copy
import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fusedbayes import functional, reference
from fusedbayes.checks import check_fits, check_moment, check_number, describe
from fusedbayes.nn.pruned import PrunedTensors, kl_of_the_rest, masked
from fusedbayes.priors import Normal, Prior
from fusedbayes.reference import GaussianParameter

# What every module has, whatever its class.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


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
        held = self._parameters
        # What is not held here is elsewhere: parametrized, or a replica's attribute.
        return [name for name in self.random_tensors if held.get(f"{name}_mu", name) is not None]

    def gaussian(self, name: str) -> GaussianParameter:
        """mu, rho, prior_mu and prior_sigma of the random tensor `name`; ValueError if its prior is not Normal."""
        return GaussianParameter(*self.posterior(name), *self.prior(name))

    def posterior(self, name: str) -> tuple[Tensor, Tensor]:
        """mu and rho of the random tensor `name`; of pruned weights those that `set_pruned` says, without gradients."""
        mu, rho, pruned = self._tensor(f"{name}_mu"), self._tensor(f"{name}_rho"), self.pruned(name)
        return (mu, rho) if pruned is None else masked(mu, rho, pruned)

    def posteriors(self) -> list[Tensor]:
        """mu and rho of each random tensor that the layer has, one after another."""
        return [tensor for name in self.random_tensors for tensor in self.posterior(name) if tensor is not None]

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
        normal = Normal()
        normal.mu, normal.sigma = self.prior(name)
        return normal

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
        held: Any = self._parameters
        if attribute in held:
            return held[attribute]
        held = self._buffers
        return held[attribute] if attribute in held else getattr(self, attribute)

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
        if rows and (pruned is not None or any(t.dim() > 0 for t in _tensors(prior))):
            # Hyperparameters of the weights belong to all of them: the other rows are left out as pruned weights are.
            pruned = _without_rows(pruned, mu, rows)
            mu, rho = masked(mu, rho, pruned)
            rows = ()
        if pruned is not None:
            return kl_of_the_rest(self.prior(name) if prior is None else prior, pruned, mu, rho)
        whole = (mu, rho, *(self.prior(name) if prior is None else ()))
        # What is 0-d holds for all rows.
        parts = [tuple(t if t.dim() == 0 else t[part] for t in whole) for part in rows] or [whole]
        if prior is None:
            kls = [functional.weight_kl(mu, rho, (prior_mu, prior_sigma)) for mu, rho, prior_mu, prior_sigma in parts]
        else:
            kls = [prior.weight_kl(*part) for part in parts]
        return kls[0] if len(kls) == 1 else torch.stack(kls).sum()

    @torch.no_grad()
    def set_prior(self, mu: float | Tensor | Prior, sigma: float | Tensor | None = None, name: str = "weight") -> None:
        """Sets the prior of one random tensor, N(mu, sigma^2) or whichever, by copy.

        Layers with tied weights are charged with the prior of the first of them: set it there.

        Args:
            mu, sigma: numbers, or tensors of the parameter's shape; sigma is a standard deviation > 0. Or one
                `fusedbayes.priors.Prior` and no sigma, as in ``set_prior(Laplace(0.0, 0.1), name="bias")``. A prior
                with parameters has them trained: make the optimizer afterwards.
            name: of the random tensor (default "weight").

        Raises:
            TypeError: `mu` or `sigma` is neither a number nor a floating-point tensor.
            ValueError: no such random tensor, a shape that is neither () nor the parameter's, or a sigma that is not
                positive and finite; a prior with a sigma besides.
        """
        self._check_name(name)
        like, _ = self.posterior(name)
        if isinstance(mu, Prior):
            if sigma is not None:
                raise ValueError(f"a prior is given as it is, without sigma, got sigma={sigma}")
            given = mu
            if type(given) is not Normal:
                self._hold_prior(name, given)
                return
            mu, sigma = given.mu, given.sigma
        check_moment(mu, "prior_mu", like, like.dtype)
        check_moment(sigma, "prior_sigma", like, like.dtype, positive=True)
        assert sigma is not None
        self._hold_normal(name, mu, sigma)

    @torch.no_grad()
    def set_sigma(self, sigma: float | Tensor, name: str = "weight") -> None:
        """Sets the posterior's standard deviation of one random tensor.

        Args:
            sigma: > 0, a number or a floating-point tensor, 0-d or of the parameter's shape.
            name: of the random tensor (default "weight").

        Raises:
            TypeError: `sigma` is neither a number nor a floating-point tensor.
            ValueError: no such random tensor, another shape, or a sigma that is not positive and finite.
        """
        self._check_name(name)
        rho = self._tensor(f"{name}_rho")
        check_moment(sigma, "sigma", rho, reference.compute_dtype(rho), positive=True)
        self._hold_sigma(name, sigma, "sigma")

    def _check_name(self, name: str) -> None:
        if name not in self.names():
            raise ValueError(f"name must be one of {', '.join(map(repr, self.names()))}, got {name!r}")

    def _hold_sigma(self, name: str, sigma: float | Tensor, argument: str) -> None:
        rho = self._tensor(f"{name}_rho")
        check_fits(sigma, argument, rho.dtype, 0.0)
        if rho.is_meta:
            return  # arithmetic without data has torch import its compiler, and Triton with it
        if not isinstance(sigma, Tensor):
            sigma = torch.full((), sigma, device=rho.device)
        rho.copy_(reference.rho_from_sigma(sigma.to(reference.compute_dtype(rho))))

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
            # And what is no tensor.
            for held, given in zip(own.modules(), prior.modules(), strict=True):
                vars(held).update(copy.deepcopy(configuration(given)))
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


def configuration(module: nn.Module) -> dict[str, Any]:
    """The attributes of `module` that its class, or whoever else, added to those of every module."""
    return {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}


def _without_rows(pruned: Tensor | None, like: Tensor, rows: tuple[slice, ...]) -> Tensor:
    """The mask, if there is one, and all rows of `like` but these."""
    others = torch.ones(like.shape, dtype=torch.bool, device=like.device)
    for part in rows:
        others[part] = False
    return others if pruned is None else others | pruned


def _tensors(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else list(itertools.chain(module.parameters(), module.buffers()))


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [tensor.shape for tensor in _tensors(module)]

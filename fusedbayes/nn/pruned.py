"""Pruned weights of a layer: the mask that says which, and a KL without them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fusedbayes import reference
from fusedbayes.checks import describe
from fusedbayes.priors import Normal, Prior

# What a pruned weight has for rho: a sigma of 2^-60, about 1e-18, which no sum with another weight notices. No rho has
# the sigma 0, and a much smaller one would draw subnormal numbers, which are slow.
PRUNED_RHO = -60.0 * math.log(2.0)


class PrunedTensors(nn.Module):
    """A module whose random tensors have masks, the buffers ``{name}_pruned``, where weights of theirs were pruned."""

    def names(self) -> list[str]:
        """The random tensors."""
        raise NotImplementedError

    def pruned(self, name: str) -> Tensor | None:
        """Which weights of the random tensor `name` are pruned, of its shape; None if none were."""
        return self._buffers.get(f"{name}_pruned")

    @torch.no_grad()
    def set_pruned(self, pruned: Tensor | None, name: str = "weight") -> None:
        """Takes weights out of one random tensor, as `fusedbayes.prune` does; replaces the mask of before.

        A pruned weight has the mean 0 and a sigma of 2^-60 (about 1e-18), no part in the KL and no gradient, so that it
        stays what it is in training. Its own rho stays in the parameter, but is not looked at. The mask is the buffer
        ``{name}_pruned``, in the state_dict. Layers with tied weights want the same mask.

        Args:
            pruned: bool, of the parameter's shape: True where the weight goes. None: no weight is pruned any longer;
                those that were go on from the mean 0 with their own rho.
            name: of the random tensor (default "weight").

        Raises:
            TypeError: `pruned` is not a bool tensor.
            ValueError: no such random tensor, one that is computed by a parametrization, or another shape.
        """
        names = [each for each in self.names() if f"{each}_mu" in self._parameters]  # and no parametrization
        if name not in names:
            raise ValueError(f"name must be one of {', '.join(map(repr, names))}, got {name!r}")
        if pruned is None:
            self._buffers.pop(f"{name}_pruned", None)
            return
        mu = self._parameters[f"{name}_mu"]
        assert mu is not None
        if not isinstance(pruned, Tensor) or pruned.dtype != torch.bool:
            raise TypeError(f"pruned must be a bool tensor, got {describe(pruned)}")
        if pruned.shape != mu.shape:
            raise ValueError(f"pruned must have shape {tuple(mu.shape)}, got {tuple(pruned.shape)}")
        with torch.inference_mode(False):
            self.register_buffer(f"{name}_pruned", pruned.to(mu.device, copy=True))
        mu.masked_fill_(pruned.to(mu.device), 0.0)

    def _expect_mask(self, name: str, state_dict: dict[str, Any], prefix: str) -> None:
        """Makes room for the mask of a checkpoint, or for its having none, if it holds the random tensor."""
        mu = self._parameters.get(f"{name}_mu")
        if mu is not None and f"{prefix}{name}_mu" in state_dict and f"{prefix}{name}_rho" in state_dict:
            self._buffers.pop(f"{name}_pruned", None)
            if f"{prefix}{name}_pruned" in state_dict:
                with torch.inference_mode(False):
                    self.register_buffer(f"{name}_pruned", torch.zeros_like(mu, dtype=torch.bool))


class PriorOfTheRest(Prior):
    """A prior under which pruned weights have no KL.

    Args:
        prior: of the others.
        pruned: the mask.
        rho: of the posterior.
    """

    def __init__(self, prior: Prior, pruned: Tensor, rho: Tensor) -> None:
        super().__init__()
        self.prior, self.pruned = prior, pruned
        vars(self)["is_analytic"] = prior.is_analytic
        # Of the pruned weights' rho as it is rounded in their dtype.
        self.sigma = reference.sigma_from_rho(rho.new_full((), PRUNED_RHO).to(reference.compute_dtype(rho)))

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        return self.prior.kl(mu, sigma).masked_fill(self.pruned, 0.0)

    def log_prob(self, w: Tensor) -> Tensor:
        # Of a pruned weight the posterior's density, so that nothing is left of it in log q - log p.
        log_q = normal_of(w.new_zeros(()), self.sigma).log_prob(w)
        return torch.where(self.pruned, log_q, self.prior.log_prob(w))


def normal_of(mu: Tensor, sigma: Tensor) -> Normal:
    """The prior with these tensors, not copies."""
    normal = Normal()
    # Past torch.nn.Module.__setattr__, which torch.compile does not trace for buffers.
    normal._buffers.update(mu=mu, sigma=sigma)
    return normal

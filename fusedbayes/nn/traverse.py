"""Walks over a model: its Bayesian layers, and its random tensors, each once."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from fusedbayes.checks import check_module
from fusedbayes.nn.module import BayesModule
from fusedbayes.reference import GaussianParameter

# Wrappers that put their own name into the path of every module below them.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class VariationalParameter(NamedTuple):
    """One random tensor of a model: the layer's qualified name, the layer, and the tensor's name in it."""

    layer_name: str
    layer: BayesModule
    name: str

    @property
    def mu(self) -> Tensor:
        """The means."""
        return self.layer.posterior(self.name)[0]

    @property
    def rho(self) -> Tensor:
        """Of which sigma = softplus(rho)."""
        return self.layer.posterior(self.name)[1]

    @property
    def value(self) -> GaussianParameter:
        """mu, rho and the prior, if it is Normal."""
        return self.layer.gaussian(self.name)


def identity(layer: BayesModule, name: str) -> tuple[object, object]:
    """What makes a random tensor the same one wherever it is held: its mu and its rho.

    A parametrized one is computed anew at each access and so has no identity but its place.
    """
    mu, rho = layer._parameters.get(f"{name}_mu"), layer._parameters.get(f"{name}_rho")
    return (id(layer), name) if mu is None or rho is None else (id(mu), id(rho))


def qualified_name(path: str) -> str:
    """A module's name without the names that wrappers such as torch.compile's put into its path."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def bayes_modules(model: nn.Module) -> Iterator[tuple[str, BayesModule]]:
    """Every distinct Bayesian layer of `model` with its qualified name, wrappers' names left out."""
    check_module(model)
    # In the order of named_modules(), which takes twice as long, and this runs in each training step.
    seen, ahead = set(), [("", model)]
    while ahead:
        path, module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, BayesModule):
            yield path, module
        children = module._modules
        # DistributedDataParallel, AveragedModel and the like, around the whole model.
        wraps = not path and len(children) == 1 and "module" in children and not isinstance(module, BayesModule)
        for name, child in reversed(children.items()):
            if child is not None:
                own = path if wraps or name in _WRAPPERS else f"{path}.{name}" if path else name
                ahead.append((own, child))


def variational_parameters(model: nn.Module) -> Iterator[VariationalParameter]:
    """Every distinct random tensor of `model` once, with the first layer that holds it; tied layers share theirs.

    Or with the first that draws all of it: an embedding does not draw its padding row, but an output layer with the
    same table does.
    """
    owners: dict[tuple[object, object], VariationalParameter] = {}
    for layer_name, layer in bayes_modules(model):
        for name in layer.names():
            key = identity(layer, name)
            if key not in owners or (layer.draws_all and not owners[key].layer.draws_all):
                owners[key] = VariationalParameter(layer_name, layer, name)
    yield from owners.values()

"""What every Bayesian layer shares: parameters and priors by name, the KL, and where the noise comes from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fusedbayes import functional
from fusedbayes.checks import check_module, check_number, describe
from fusedbayes.noise import Address
from fusedbayes.reference import Estimator, GaussianParameter

# Wrappers that put their own name into the path of every module below them.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class FrozenNoise:
    """The noise of one function draw, as a layer sees it; set by `fusedbayes.frozen_sample`.

    Attributes:
        seed, sample: 0-d int64 tensors on the layer's device.
        addresses: of each of the layer's random tensors, by name.
        estimator: in place of the layer's own, if not None.
        each_sample: whether the Monte Carlo samples of one batch have draws of their own, from `sample` on.
    """

    seed: Tensor
    sample: Tensor
    addresses: dict[str, Address]
    estimator: Estimator | None = None
    each_sample: bool = False


class MeanWeights:
    """Stands in for noise while `fusedbayes.mean_mode` is on: every weight is its posterior mean."""


class Repeated(NamedTuple):
    """A batch, and its repetition for several Monte Carlo samples, with their versions then."""

    tensor: Tensor
    batch: Tensor
    versions: tuple[int, int]

    def is_(self, input: Tensor) -> bool:
        """Whether `input` is the very repetition, and neither was written to since."""
        return input is self.tensor and self.versions == (self.tensor._version, self.batch._version)


class Fold(NamedTuple):
    """What the inputs of a model's layers hold; set by `fusedbayes.folding`.

    Attributes:
        num_samples, batch: so many batches of so many rows along dimension 0, or whole multiples of these rows.
        repeated: the model's own input, if it is a tensor.
    """

    num_samples: int
    batch: int
    repeated: Repeated | None = None

    def holds(self, rows: int) -> bool:
        """Whether so many rows are its batches, or whole multiples of their rows."""
        return rows % (self.num_samples * self.batch or 1) == 0


class FusedKL(NamedTuple):
    """The KL that a forward gave, and the parameters it was given for.

    Attributes:
        kl: 0-d.
        parameters: mu and rho of each random tensor, as the forward saw them.
        requires_grad: of each of them, then.
    """

    kl: Tensor
    parameters: tuple[Tensor, ...]
    requires_grad: tuple[bool, ...]


class VariationalParameter(NamedTuple):
    """One random tensor of a model: the layer's qualified name, the layer, and the tensor's name in it."""

    layer_name: str
    layer: "BayesModule"
    name: str

    @property
    def value(self) -> GaussianParameter:
        """mu, rho and the prior."""
        return self.layer.gaussian(self.name)

    @property
    def key(self) -> tuple[object, object]:
        """What makes it the same random tensor wherever it is held: its mu and its rho.

        A parametrized one is computed anew at each access and so has no identity but its place.
        """
        held = self.layer._parameters
        mu, rho = f"{self.name}_mu", f"{self.name}_rho"
        return (id(held[mu]), id(held[rho])) if mu in held and rho in held else (id(self.layer), self.name)


class BayesModule(nn.Module):
    """Base class of the Bayesian layers.

    A random tensor `name` has the parameters ``{name}_mu`` and ``{name}_rho``, sigma = softplus(rho), and the prior in
    the buffers ``{name}_prior_mu`` and ``{name}_prior_sigma``: 0-d for a scalar prior, else of the tensor's shape. All
    four are in the state_dict. The layer samples in training and evaluation mode alike; `fusedbayes.frozen_sample` and
    `fusedbayes.mean_mode` change that for a while.
    """

    random_tensors: ClassVar[tuple[str, ...]] = ()

    # Set for a while by the context managers of `fusedbayes.predict` and `fusedbayes.objective`; neither copied nor
    # saved. In the instance's __dict__ from the start: torch.compile guards on what is there. What changes at each step
    # is written there too, past torch.nn.Module.__setattr__, which first looks for a parameter or module to register.
    _noises: tuple[FrozenNoise | MeanWeights, ...]  # of the contexts that are open; the last one counts
    _fold: Fold | None
    _recalls: tuple[Fold, ...]  # of forwards whose backward pass is running and may repeat them for a checkpoint
    _kl_wanted: bool
    _kl_of_forward: FusedKL | None
    _TRANSIENT: ClassVar[dict[str, Any]] = {
        "_noises": (),
        "_fold": None,
        "_recalls": (),
        "_kl_wanted": False,
        "_kl_of_forward": None,
    }

    def __init__(self) -> None:
        super().__init__()
        vars(self).update(self._TRANSIENT)

    @property
    def is_held(self) -> bool:
        """Whether `fusedbayes.frozen_sample` or `fusedbayes.mean_mode` decides at present what the layer draws."""
        return bool(self._noises)

    def _samples_in(self, input: Tensor) -> int:
        """For how many Monte Carlo samples the input of this forward holds rows."""
        fold, rows = self._fold, input.shape[0] if isinstance(input, Tensor) and input.dim() > 1 else 0
        if fold is None and not torch.compiler.is_compiling() and self._recalls:
            fold = self._recalled(rows)
        if fold is None or fold.num_samples == 1 or not isinstance(input, Tensor):
            return 1
        if not fold.holds(rows) or input.dim() < 2:
            raise ValueError(
                f"the model runs {fold.num_samples} Monte Carlo samples of a batch of {fold.batch} as one along "
                f"dimension 0, but a Bayesian layer got {tuple(input.shape)}, whose dimension 0 is no multiple of "
                f"{fold.num_samples * fold.batch}: pass samples_at_once=1 to run them one by one"
            )
        return fold.num_samples

    def _recalled(self, rows: int) -> Fold | None:
        if torch._C._current_graph_task_id() == -1:
            vars(self)["_recalls"] = ()  # left by a backward pass that failed
            return None
        folds = {fold for fold in self._recalls if fold.holds(rows)}
        if len(folds) > 1:
            raise RuntimeError(
                "one backward pass repeats checkpointed forwards of different numbers of Monte Carlo samples: pass "
                "samples_at_once=1, or differentiate the losses one by one"
            )
        return folds.pop() if folds else None

    def names(self) -> list[str]:
        """The random tensors that the layer has: without a bias, "bias" is not among them."""
        return [name for name in self.random_tensors if self._tensor(f"{name}_mu") is not None]

    def gaussian(self, name: str) -> GaussianParameter:
        """mu, rho, prior_mu and prior_sigma of the random tensor `name`."""
        return GaussianParameter(*self.posterior(name), *self.prior(name))

    def posterior(self, name: str) -> tuple[Tensor, Tensor]:
        """mu and rho of the random tensor `name`."""
        return self._tensor(f"{name}_mu"), self._tensor(f"{name}_rho")

    def prior(self, name: str) -> tuple[Tensor, Tensor]:
        """prior_mu and prior_sigma of the random tensor `name`."""
        return self._tensor(f"{name}_prior_mu"), self._tensor(f"{name}_prior_sigma")

    def _tensor(self, attribute: str) -> Any:
        # From where torch.nn.Module keeps it: its own way there takes several times as long. A parametrized tensor is
        # not kept, but computed by a property.
        for held in (self._parameters, self._buffers):
            if attribute in held:
                return held[attribute]
        return getattr(self, attribute)

    def kl_loss(self) -> Tensor:
        """KL of the posterior from the prior, summed over the layer's parameters; see `fusedbayes.kl_loss`.

        Returns:
            0-d float32 tensor (float64 for float64 parameters) in nats, differentiable.
        """
        return torch.stack([self.kl_of(name) for name in self.names()]).sum()

    def kl_of(self, name: str) -> Tensor:
        """The KL of one random tensor, 0-d."""
        parameter = self.gaussian(name)
        return functional.weight_kl(parameter.mu, parameter.rho, (parameter.prior_mu, parameter.prior_sigma))

    @torch.no_grad()
    def set_prior(self, mu: float | Tensor, sigma: float | Tensor, name: str = "weight") -> None:
        """Sets the prior N(mu, sigma^2) of one random tensor, by copy.

        Layers with tied weights are charged with the prior of the first of them: set it there.

        Args:
            mu, sigma: numbers, or tensors of the parameter's shape; sigma is a standard deviation > 0.
            name: of the random tensor, "weight" (default) or "bias".

        Raises:
            TypeError: `mu` or `sigma` is neither a number nor a floating-point tensor.
            ValueError: no such random tensor, a shape that is neither () nor the parameter's, or a sigma that is not
                positive and finite.
        """
        if name not in self.names():
            raise ValueError(f"name must be one of {', '.join(map(repr, self.names()))}, got {name!r}")
        like = self.gaussian(name).mu
        for part, value, positive in (("prior_mu", mu, False), ("prior_sigma", sigma, True)):
            if not isinstance(value, Tensor):
                check_number(value, part, positive=positive)
                continue
            if not value.is_floating_point():
                raise TypeError(f"{part} must be a number or a floating-point tensor, got {describe(value)}")
            if value.shape not in ((), like.shape):
                raise ValueError(f"{part} must have shape () or {tuple(like.shape)}, got {tuple(value.shape)}")
            rounded = value.to(like.dtype)
            if not torch.isfinite(rounded).all() or (positive and not (rounded > 0).all()):
                raise ValueError(
                    f"{part} must be finite{' and positive' if positive else ''} in {like.dtype}, got {value}"
                )
        self._fill_prior(name, mu, sigma)

    def _fill_prior(self, name: str, mu: float | Tensor, sigma: float | Tensor) -> None:
        like = self.gaussian(name).mu
        check_fits(mu, "prior_mu", like.dtype, -torch.finfo(like.dtype).max)
        check_fits(sigma, "prior_sigma", like.dtype, torch.finfo(like.dtype).tiny)
        for part, value in (("prior_mu", mu), ("prior_sigma", sigma)):
            # A copy: a prior that shared storage with mu would move with it. Never an inference tensor: training
            # could not save it for the backward pass.
            with torch.inference_mode(False):
                new = value.detach().to(like, copy=True) if isinstance(value, Tensor) else like.new_full((), value)
            setattr(self, f"{name}_{part}", new)

    def _register_gaussian(self, name: str, shape: tuple[int, ...] | None, factory: dict[str, Any]) -> None:
        """Declares a random tensor of `shape`, or its absence; its values are reset_parameters' business."""
        for part in ("mu", "rho"):
            value = None if shape is None else nn.Parameter(torch.empty(shape, **factory))
            self.register_parameter(f"{name}_{part}", value)
        for part in ("prior_mu", "prior_sigma"):
            self.register_buffer(f"{name}_{part}", None if shape is None else torch.empty((), **factory))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint may hold a scalar prior or one value per weight; the buffer takes the checkpoint's form.
        for name in self.names():
            for part in ("prior_mu", "prior_sigma"):
                saved, buffer = state_dict.get(f"{prefix}{name}_{part}"), getattr(self, f"{name}_{part}")
                shapes = ((), getattr(self, f"{name}_mu").shape)
                if isinstance(saved, Tensor) and saved.shape in shapes and saved.shape != buffer.shape:
                    with torch.inference_mode(False):
                        setattr(self, f"{name}_{part}", buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._TRANSIENT}

    def _prior_repr(self) -> str:
        """N(mu, sigma) of the weights' prior for extra_repr, or that it is given per weight."""
        _, _, mu, sigma = self.gaussian("weight")
        if mu.is_meta:
            return "prior=meta"
        values = [f"{t.item():.4g}" if t.dim() == 0 else "per weight" for t in (mu, sigma)]
        return f"prior_mu={values[0]}, prior_sigma={values[1]}"


def check_fits(value: float | Tensor, name: str, dtype: torch.dtype, least: float) -> None:
    """Raises ValueError unless the number `value` lies between `least` and the largest number of `dtype`."""
    most = torch.finfo(dtype).max
    if not isinstance(value, Tensor) and not least <= value <= most:
        raise ValueError(f"{name} must lie in [{least:.4g}, {most:.4g}] for {dtype}, got {value}")


def qualified_name(path: str) -> str:
    """A module's name without the names that wrappers such as torch.compile's put into its path."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def bayes_modules(model: nn.Module) -> Iterator[tuple[str, BayesModule]]:
    """Every distinct Bayesian layer of `model` with its qualified name, wrappers' names left out."""
    check_module(model)
    while list(model._modules) == ["module"] and not isinstance(model, BayesModule):
        model = model.get_submodule("module")  # DistributedDataParallel, AveragedModel and the like
    for path, module in model.named_modules():
        if isinstance(module, BayesModule):
            yield qualified_name(path), module


def variational_parameters(model: nn.Module) -> Iterator[VariationalParameter]:
    """Every distinct random tensor of `model` once, with the first layer that holds it; tied layers share theirs."""
    seen = set()
    for layer_name, layer in bayes_modules(model):
        for name in layer.names():
            parameter = VariationalParameter(layer_name, layer, name)
            if parameter.key not in seen:
                seen.add(parameter.key)
                yield parameter

"""Loading what other libraries trained: their checkpoints into the same architecture built of Bayesian layers.

docs/migrating.md puts their classes, arguments and objectives beside those of this package.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fusedbayes import reference
from fusedbayes.checks import check_module, describe
from fusedbayes.diagnostics import Report
from fusedbayes.nn.module import BayesModule
from fusedbayes.nn.traverse import qualified_name
from fusedbayes.priors import Normal, Prior, ScaleMixture

Library = Literal["bayesian-torch", "torchbnn", "blitz", "torch-uncertainty"]


class ImportRow(NamedTuple):
    """One random tensor in the report of `load_foreign`.

    Attributes:
        name: qualified name, such as "encoder.0.weight".
        size: number of weights.
        source: names of its mean and scale in the checkpoint.
        prior: the prior that it has now.
    """

    name: str
    size: int
    source: str
    prior: str


class _Format(NamedTuple):
    """How a library's layers name what they hold.

    Attributes:
        tensors: for a random tensor of ours, the names that its mean and scale may have.
        ignored: what comes with a weight, with a bias or without one: noise, priors, second names of the same tensors.
        scale: what stands for sigma: "rho", sigma = log(1 + exp(rho)), or "log_sigma".
        unmapped: why random tensors of ours have no counterpart.
    """

    tensors: dict[str, list[tuple[str, str]]]
    ignored: list[str]
    scale: Literal["rho", "log_sigma"]
    unmapped: Mapping[str, str]


_BOTH = ("weight", "bias")
# Of ignored names, {} stands for weight, and for bias in a layer with a bias.
_FORMATS: dict[str, _Format] = {
    "bayesian-torch": _Format(
        {
            "weight": [("mu_weight", "rho_weight"), ("mu_kernel", "rho_kernel")],
            "bias": [("mu_bias", "rho_bias")],
            **{f"{name}_{of}_l0": [(f"{of}.mu_{name}", f"{of}.rho_{name}")] for name in _BOTH for of in ("ih", "hh")},
        },
        # Of releases that kept noise and priors in the state_dict.
        ["eps_{}", "eps_kernel", "prior_{}_mu", "prior_{}_sigma"],
        "rho",
        {},
    ),
    "torchbnn": _Format(
        {name: [(f"{name}_mu", f"{name}_log_sigma")] for name in _BOTH},
        ["{}_eps"],  # of a frozen layer
        "log_sigma",
        {},
    ),
    "blitz": _Format(
        # What its forward draws from and trains is the sampler's: parameters of their own as soon as the model moved.
        {name: [(f"{name}_sampler.mu", f"{name}_sampler.rho"), (f"{name}_mu", f"{name}_rho")] for name in _BOTH},
        ["{}_mu", "{}_rho", "{}_sampler.mu", "{}_sampler.rho", "{}_sampler.eps_w", "bias_zero"],
        "rho",
        dict.fromkeys(
            [f"{name}_{of}_l0" for name in _BOTH for of in ("ih", "hh")],
            "BLiTZ adds one bias to the gates where torch adds two: no posterior of ours is the same",
        ),
    ),
    "torch-uncertainty": _Format(
        {name: [(f"{name}_mu", f"{name}_sigma")] for name in _BOTH},  # what is called sigma is rho
        ["{}_sampler.mu", "{}_sampler.rho", "{}_prior_dist.pi", "{}_prior_dist.mus", "{}_prior_dist.sigmas"],
        "rho",
        {},
    ),
}
# Endings of names by which a checkpoint is recognised, in an error, as one of another library.
_ENDINGS = {
    "bayesian-torch": {"mu_weight", "mu_kernel"},
    "torchbnn": {"weight_log_sigma"},
    "torch-uncertainty": {"weight_sigma"},
    "blitz": {"weight_rho"},
}


def load_foreign(
    model: nn.Module,
    source: Mapping[str, Any] | nn.Module,
    library: Library,
    *,
    prior: Prior | Literal["keep"] | None = None,
) -> Report[ImportRow]:
    """Loads what another library trained into `model`, the same architecture built of this package's layers.

    Modules have the same names in both; parameters need not. The posterior stays the same: means are copied, and so is
    rho where the library has sigma = log(1 + exp(rho)); torchbnn's log(sigma) becomes rho. Other tensors (of nn.Linear,
    nn.BatchNorm2d and so on) are loaded as `load_state_dict` does. What a layer is told by its constructor, such as
    stride, padding and estimator, is up to `model`.

    Args:
        model: changed in place; dtype and device of its tensors stay.
        source: a state_dict, as ``torch.load("model.pt")`` gives it, or the other library's model itself.
        library: "bayesian-torch", "torchbnn", "blitz" (blitz-bayesian-pytorch) or "torch-uncertainty".
        prior: of every random tensor. None (default): the source's own, which models have, and checkpoints of
            torch-uncertainty, but no checkpoints of the others. A prior, such as ``priors.Normal(0.0, 1.0)``; its sigma
            is a standard deviation, and so is bayesian-torch's `prior_variance`. "keep": the priors that `model` has,
            say because they differ from layer to layer.

    Returns:
        An `ImportRow` for each random tensor; ``print(report)`` shows a table.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the library is not known; tensors are missing, unexpected or of another shape (each is named); the
            prior is not known, or none that the layers can have. `model` is unchanged then.
    """
    check_module(model)
    if library not in _FORMATS:
        raise ValueError(f"library must be one of {', '.join(map(repr, get_args(Library)))}, got {library!r}")
    tensors: Any = source
    modules: dict[str, nn.Module] = {}
    if isinstance(source, nn.Module):
        modules = dict(source.named_modules(remove_duplicate=False))
        # BLiTZ's linear layer has parameters of a bias that it does not use.
        unused = tuple(_join(path, "bias_") for path, module in modules.items() if getattr(module, "bias", 0) is False)
        tensors = {key: value for key, value in source.state_dict().items() if not key.startswith(unused)}
    if not isinstance(tensors, Mapping) or not all(isinstance(key, str) for key in tensors):
        raise TypeError(f"source must be a state_dict or a module, got {describe(source)}")
    if prior is not None and prior != "keep" and not isinstance(prior, Prior):
        raise TypeError(f"prior must be a fusedbayes.priors.Prior, 'keep' or None, got {describe(prior)}")
    if not any(isinstance(module, BayesModule) for module in model.modules()):
        raise ValueError("model has no Bayesian layer to load into: convert it with fusedbayes.to_bayesian first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model is on the meta device, without room for values: call model.to_empty(device=...) first")
    translation = _Translation(model, tensors, library)
    translation.check()
    found = translation.found
    priors = [] if prior == "keep" else [prior or _prior_of(tensor, tensors, modules, library) for tensor in found]
    for tensor, its_prior in zip(found, priors, strict=False):
        _check_fits(its_prior, tensor)
    # From here on nothing fails.
    model.load_state_dict(translation.state, strict=False)
    for tensor, its_prior in zip(found, priors, strict=False):
        tensor.layer.set_prior(its_prior, name=tensor.name)
    return Report(t.row() for t in found)


class _Found(NamedTuple):
    """A random tensor of ours, and the names of its mean and scale in the source."""

    path: str
    layer: BayesModule
    name: str
    mu: str
    scale: str

    @property
    def kind(self) -> str:
        """Either weight or bias."""
        return self.name.partition("_")[0]

    @property
    def holder(self) -> str:
        """The module in the source: bayesian-torch's LSTM has two linear layers."""
        of = self.mu.removeprefix(f"{self.path}.").partition(".")[0]
        return _join(self.path, of) if of in ("ih", "hh") else self.path

    def row(self) -> ImportRow:
        prior = self.layer.prior_of(self.name)
        size = self.layer.posterior(self.name)[0].numel()
        shown = f"{type(prior).__name__}({prior.extra_repr()})"
        return ImportRow(_join(self.path, self.name), size, f"{self.mu}, {self.scale}", shown)


class _Translation:
    """A foreign state_dict in the names and the parametrisation of the model's own, and what does not fit.

    Attributes:
        state: what `model.load_state_dict` takes: all but the priors.
        found: the random tensors in it.
    """

    def __init__(self, model: nn.Module, source: Mapping[str, Any], library: str) -> None:
        self._source, self._library, self._format = source, library, _FORMATS[library]
        self._missing: list[str] = []
        self._problems: list[str] = []
        self._seen: set[str] = set()
        self.state: dict[str, Any] = {}
        self.found: list[_Found] = []
        others = model.state_dict(keep_vars=True)
        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, BayesModule):
                self._translate(path, module)
                paths = {path, *(_join(path, prior) for prior in module.prior_modules())}
                others = {key: value for key, value in others.items() if key.rpartition(".")[0] not in paths}
        for key, value in others.items():
            name = qualified_name(key)
            if self._take(name, value):
                self.state[key] = source[name]
        self._check_ties(model)

    def _translate(self, path: str, layer: BayesModule) -> None:
        own = qualified_name(path)
        absent = [name for name in layer.names() if name not in self._format.tensors]
        if absent:
            reason = self._format.unmapped.get(absent[0], f"{self._library} has no {', '.join(absent)}")
            self._problems.append(f"no counterpart: {own!r}, a {type(layer).__name__}: {reason}")
            self._seen.update(name for name in self._source if name.startswith(_join(own, "")))
            return
        for name in layer.names():
            names = [tuple(_join(own, part) for part in parts) for parts in self._format.tensors[name]]
            mu, scale = max(names, key=lambda pair: sum(part in self._source for part in pair))
            found = _Found(own, layer, name, mu, scale)
            self._seen.update(_join(found.holder, part.format(found.kind)) for part in self._format.ignored)
            fits = [self._take(part, like) for part, like in zip((mu, scale), layer.posterior(name), strict=True)]
            if all(fits):
                self.found.append(found)
                self.state[_join(path, f"{name}_mu")] = self._source[mu]
                self.state[_join(path, f"{name}_rho")] = self._rho(self._source[scale])

    def _rho(self, scale: Tensor) -> Tensor:
        # The same formula for sigma, the same rho, bit by bit; else by way of float64, rounded once.
        return scale if self._format.scale == "rho" else reference.rho_from_sigma(scale.double().exp())

    def _take(self, name: str, like: Any) -> bool:
        """Whether the source has this; notes what is wrong otherwise."""
        self._seen.add(name)
        if name not in self._source:
            self._missing.append(name)
            return False
        value = self._source[name]
        if not isinstance(like, Tensor):
            return True
        if not isinstance(value, Tensor) or value.shape != like.shape:
            self._problems.append(f"shape: {name!r} must be {tuple(like.shape)}, got {describe(value)}")
            return False
        if value.is_meta or value.layout != torch.strided or value.is_complex() != like.is_complex():
            kind = "on the meta device" if value.is_meta else f"{value.layout} {value.dtype}"
            self._problems.append(f"values: {name!r} must be a dense tensor that fits {like.dtype}, got one {kind}")
            return False
        return True

    def _check_ties(self, model: nn.Module) -> None:
        first: dict[int, str] = {}
        for key, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, nn.Parameter) and key in self.state:
                twin = first.setdefault(id(tensor), key)
                if twin != key and not torch.equal(self.state[key], self.state[twin]):
                    self._problems.append(f"tied: {twin!r} and {key!r} are one tensor in model, but differ in source")

    def check(self) -> None:
        """Raises ValueError that names all that does not fit."""
        unexpected = [name for name in self._source if name not in self._seen]
        lists = {"missing": self._missing, "unexpected": unexpected}
        problems = [f"{kind}: {', '.join(map(repr, names))}" for kind, names in lists.items() if names]
        problems += self._problems
        if not problems:
            return
        endings = {name.rpartition(".")[2] for name in self._source}
        others = [library for library in _ENDINGS if endings & _ENDINGS[library]]
        if others and self._library not in others:
            problems.append(f"the names look like those of {' or '.join(others)}")
        if self._library == "blitz" and any(name.endswith("bias_rho") for name in unexpected):
            problems.append("BLiTZ's linear layer has a bias even with bias=False: delete it, or pass the model itself")
        raise ValueError(f"source does not fit model as {self._library}'s\n  " + "\n  ".join(problems))


def _prior_of(tensor: _Found, tensors: Mapping[str, Any], modules: Mapping[str, Any], library: str) -> Prior:
    """The prior that the source gives a random tensor."""
    path, kind = tensor.holder, tensor.kind
    module = modules.get(path)
    if library == "torch-uncertainty":
        pi, sigmas = (tensors.get(_join(path, f"{kind}_prior_dist.{part}")) for part in ("pi", "sigmas"))
        if isinstance(pi, Tensor) and isinstance(sigmas, Tensor):
            return _mixture(pi[0].item(), *sigmas.tolist())
    elif library == "bayesian-torch":
        names = [f"prior_{kind}_{part}" for part in ("mu", "sigma")]
        mu, sigma = (getattr(module, name, tensors.get(_join(path, name))) for name in names)
        if isinstance(mu, Tensor) and isinstance(sigma, Tensor):
            return Normal(_collapsed(mu), _collapsed(sigma))
    elif library == "torchbnn" and module is not None:
        return Normal(module.prior_mu, module.prior_sigma)
    elif library == "blitz" and module is not None:
        held_by = getattr(module, f"{kind}_prior_dist")
        if held_by.dist2 is not None:
            return _mixture(held_by.pi, held_by.sigma1, held_by.sigma2)
        if type(held_by.dist1) is torch.distributions.Normal:
            return Normal(_collapsed(held_by.dist1.loc), _collapsed(held_by.dist1.scale))
        raise ValueError(f"the prior of {path!r} is {held_by.dist1}: pass one of fusedbayes.priors, or 'keep'")
    raise ValueError(
        f"source does not hold the prior of {_join(tensor.path, tensor.name)!r}: pass prior, such as "
        f"fusedbayes.priors.Normal(0.0, 1.0), as {library}'s layers were constructed with; or the {library} model "
        f"itself as source; or prior='keep' for the priors that model has"
    )


def _mixture(pi: float, sigma_1: float, sigma_2: float) -> Prior:
    if pi in (0.0, 1.0) or sigma_1 == sigma_2:
        return Normal(0.0, sigma_2 if pi == 0.0 else sigma_1)
    return ScaleMixture(pi, sigma_1, sigma_2)


def _collapsed(values: Tensor) -> float | Tensor:
    """One number if all are the same."""
    first = values.flatten()[0]
    return first.item() if bool((values == first).all()) else values


def _check_fits(prior: Prior, tensor: _Found) -> None:
    """Raises ValueError unless the layer can have the prior, in its dtype."""
    like = tensor.layer.posterior(tensor.name)[0]
    prior.check_fits(like)
    if type(prior) is Normal:
        mu, sigma = prior.mu.to(like.dtype), prior.sigma.to(like.dtype)
        if not (mu.isfinite().all() and sigma.isfinite().all() and (sigma >= torch.finfo(like.dtype).tiny).all()):
            raise ValueError(f"{prior} is no prior of {_join(tensor.path, tensor.name)!r} in {like.dtype}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

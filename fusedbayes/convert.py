"""Turning a deterministic network into a Bayesian one, and back."""

import fnmatch
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from fusedbayes import reference
from fusedbayes.checks import check_module, check_number, describe
from fusedbayes.nn.linear import BayesLinear
from fusedbayes.nn.module import BayesModule, variational_parameters
from fusedbayes.reference import Estimator

Where = Callable[[str, nn.Module], bool] | str | type[nn.Module] | Iterable[str | type[nn.Module]]

# Inference shortcuts of torch that read a child's weight without calling it: the attribute and value that switch them
# off while a child is Bayesian.
_SHORTCUTS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def to_bayesian(
    model: nn.Module,
    *,
    where: Where | None = None,
    prior_mu: float = 0.0,
    prior_sigma: float | None = None,
    sigma_init: float | None = None,
    init: Literal["mean", "moped"] = "mean",
    delta: float | None = None,
    estimator: Estimator = "shared",
) -> nn.Module:
    """Makes every `torch.nn.Linear` of `model` a `BayesLinear`, in place.

    The module objects stay and change their class, so that names, training mode, hooks, extra attributes and whoever
    holds them stay too. The weight and bias *are* the new ``weight_mu`` and ``bias_mu``, the same Parameter objects:
    values, dtype, device, requires_grad and tied weights stay as they are. An optimizer made before goes on training
    the means, but knows nothing of rho: make it afterwards. Linears that share a weight share its sigma and prior and
    are charged once.

    Subclasses of nn.Linear are left alone, because their forward may differ; that includes the output projection of
    nn.MultiheadAttention, which therefore stays deterministic. Convert a whole nn.TransformerEncoder, not its layers:
    its inference shortcut, which reads weights without calling the layers, can be switched off from above only.

    Args:
        model: any module, an nn.Linear too. It is changed and returned.
        where: which layers; None (default) all. A callable ``(name, module) -> bool``, a name or glob pattern of
            qualified names ("encoder.*"), a class, or several patterns and classes. The root's name is "".
        prior_mu, prior_sigma, sigma_init, estimator: as for `BayesLinear`.
        init: "mean" (default): prior and sigma from the arguments. "moped": the prior means become a copy of the
            weights, and sigma = delta * |w| (Krishnan, Subedar and Tickoo, "Specifying weight priors in Bayesian deep
            neural networks with empirical Bayes", AAAI 2020); for a network that is trained already.
        delta: for "moped", the ratio sigma / |w| (None means 0.1). Sigma is at least 1e-6, so that it can still be
            learnt where a weight is exactly 0.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module, or an argument is of the wrong type.
        ValueError: an argument is out of range; nothing matches; a matching layer is lazy, reparametrised or patched;
            the model is distributed already (DistributedDataParallel, FSDP), which would not see rho; or "moped" is
            combined with prior_mu or sigma_init. The model is unchanged then.
    """
    if init not in ("mean", "moped"):
        raise ValueError(f"init must be 'mean' or 'moped', got {init!r}")
    if init == "moped":
        delta = check_number(0.1 if delta is None else delta, "delta", positive=True)
        if sigma_init is not None or prior_mu != 0.0:
            raise ValueError("init='moped' sets prior_mu and sigma from the weights: leave prior_mu and sigma_init out")
    elif delta is not None:
        raise ValueError(f"delta is for init='moped', got delta={delta} with init={init!r}")
    options = {"prior_mu": prior_mu, "prior_sigma": prior_sigma, "sigma_init": sigma_init, "estimator": estimator}
    # Everything that can fail happens before the first change.
    sources = {id(p.value.mu): (p.layer, p.name) for p in variational_parameters(model)}
    twins: dict[nn.Module, nn.Module] = {}
    for linear in _select(model, nn.Linear, where):
        if init == "moped" and linear.weight.is_meta:
            raise ValueError("init='moped' needs the values of the weights, but some are on the meta device")
        with torch.inference_mode(False):  # an inference tensor could not be trained
            twins[linear] = _bayesian_linear(linear, options, delta, sources)
    return _convert(model, twins)


def to_deterministic(model: nn.Module) -> nn.Module:
    """Makes every `BayesLinear` of `model` an `nn.Linear` that computes with its means, in place.

    The inverse of `to_bayesian`: ``weight_mu`` and ``bias_mu`` become the weight and bias, the same Parameter objects.

    Args:
        model: any module, a BayesLinear too. It is changed and returned.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no BayesLinear; one holds tensors of its own or is held by `frozen_sample` or `mean_mode`;
            or the model is distributed already. The model is unchanged then.
    """
    return _convert(model, {layer: _linear(layer) for layer in _select(model, BayesLinear, None)})


def _select(model: nn.Module, kind: type[nn.Module], where: Where | None) -> list[Any]:
    """The modules of the class `kind` that `where` picks; ValueError unless each can be converted."""
    check_module(model)
    wrappers = _distributed_wrappers()
    for module in model.modules():
        if isinstance(module, wrappers):
            wrapper = type(module).__name__
            raise ValueError(f"convert the model before distributing it: {wrapper} holds the parameters as they were")
    picks = _predicate(where)
    # Under each of its names: `where` may pick a shared module by any.
    named = model.named_modules(remove_duplicate=False)
    candidates = {name: module for name, module in named if _is_of_class(module, kind)}
    chosen = {name: module for name, module in candidates.items() if picks(name, module)}
    fresh = kind(1, 1, device="meta")
    for name, module in chosen.items():
        _check_convertible(name, module, {*fresh._parameters, *fresh._buffers})
    if not chosen:
        names = ", ".join(map(repr, list(candidates)[:8])) or "none"
        more = f" and {len(candidates) - 8} more" if len(candidates) > 8 else ""
        raise ValueError(f"where={where!r} picks no {kind.__name__} to convert; the model has: {names}{more}")
    return list(dict.fromkeys(chosen.values()))


def _distributed_wrappers() -> tuple[type, ...]:
    # A model that is sharded has imported what shards it; importing it here would take a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = () if fsdp is None else (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)
    return nn.parallel.DistributedDataParallel, *sharded


def _is_of_class(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is a `kind` and no subclass; a lazy or parametrized one counts, and is refused later."""
    if kind is nn.Linear and isinstance(module, nn.LazyLinear):
        return True
    return (type(module).__bases__ if parametrize.is_parametrized(module) else (type(module),)) == (kind,)


def _check_convertible(name: str, module: Any, expected: set[str]) -> None:
    """Raises ValueError unless `module` is what its class says: the `expected` tensors and the class's forward."""
    if isinstance(module, nn.LazyLinear):
        raise ValueError(f"{name!r} is an nn.LazyLinear without weights yet: run one forward before converting")
    if "forward" in vars(module):
        raise ValueError(f"{name!r} has a forward of its own, which a converted layer would not compute")
    held = {*module._parameters, *module._buffers}
    if held != expected:
        # torch.nn.utils.weight_norm, pruning and parametrizations compute the weight from other tensors.
        raise ValueError(
            f"{name!r} must hold {sorted(expected)} and no other tensors, got {sorted(held)}: "
            "remove reparametrisations first"
        )
    if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
        raise ValueError(f"{name!r} must have floating-point weights, got dtype {module.weight.dtype}")
    if isinstance(module, BayesLinear) and module.is_held:
        raise ValueError(f"{name!r} cannot be converted inside frozen_sample or mean_mode")


def _predicate(where: Where | None) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, module: True
    if isinstance(where, str | type):
        where = (where,)
    if not isinstance(where, Iterable):
        if callable(where):
            return where
        raise TypeError(f"where must be a callable, a pattern, a class or several of these, got {describe(where)}")
    wanted = tuple(where)
    for item in wanted:
        if not isinstance(item, str | type):
            raise TypeError(f"where must hold patterns (str) and classes, got {describe(item)}")
    patterns = [item for item in wanted if isinstance(item, str)]
    classes = tuple(item for item in wanted if isinstance(item, type))
    return lambda name, module: (
        isinstance(module, classes) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )


def _bayesian_linear(
    linear: nn.Linear, options: dict[str, Any], delta: float | None, sources: dict[int, tuple[BayesModule, str]]
) -> BayesLinear:
    """The layer that takes `linear`'s place; `sources` finds the random tensor that was made of a mean before."""
    # On the meta device: the means are there already, the rest is filled in below.
    layer = BayesLinear(linear.in_features, linear.out_features, linear.bias is not None, **options, device="meta")
    for name, mean in (("weight", linear.weight), ("bias", linear.bias)):
        if mean is None:
            continue
        first, first_name = sources.setdefault(id(mean), (layer, name))
        setattr(layer, f"{name}_mu", mean)
        if first is not layer:
            for part in ("rho", "prior_mu", "prior_sigma"):
                setattr(layer, f"{name}_{part}", getattr(first, f"{first_name}_{part}"))
            continue
        layer.set_prior(layer.prior_mu if delta is None else mean, layer.prior_sigma, name)
        values = mean.detach().to(reference.compute_dtype(mean))
        sigma = torch.full_like(values, layer.sigma_init) if delta is None else (delta * values.abs()).clamp(min=1e-6)
        setattr(layer, f"{name}_rho", nn.Parameter(reference.rho_from_sigma(sigma).to(mean.dtype), mean.requires_grad))
    return layer


def _linear(layer: BayesLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias_mu is not None, device="meta")
    linear.register_parameter("weight", layer.weight_mu)
    linear.register_parameter("bias", layer.bias_mu)
    return linear


def _convert(model: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """Makes each of `twins`' modules what its twin is; hooks, training mode and foreign attributes stay its own.

    The object itself changes its class, as torch's lazy and parametrized modules do: whoever holds it, a list, an
    optimizer's closure or a compiled wrapper, holds the converted layer.
    """
    # All modules are of one class, and so are all twins.
    old, new = map(type, next(iter(twins.items())))
    dropped, kept = _constructed(old), {"_parameters", "_buffers", *_constructed(new)}
    for module, twin in twins.items():
        for attribute in dropped:
            vars(module).pop(attribute, None)
        module.__class__ = new
        vars(module).update({key: value for key, value in vars(twin).items() if key in kept})
    for parent in model.modules():
        for kind, (attribute, off) in _SHORTCUTS.items():
            if isinstance(parent, kind):
                _set_shortcut(parent, attribute, off)
    return model


def _constructed(kind: type[nn.Module]) -> set[str]:
    """The attributes that the constructor of `kind` sets beyond those of every module."""
    return set(vars(kind(1, 1, device="meta"))) - set(vars(nn.Module()))


def _set_shortcut(module: nn.Module, attribute: str, off: Any) -> None:
    kept = f"_{attribute}_before_fusedbayes"
    if any(isinstance(child, BayesLinear) for child in module.modules()):
        vars(module).setdefault(kept, getattr(module, attribute))
        setattr(module, attribute, off)
    elif kept in vars(module):
        setattr(module, attribute, vars(module).pop(kept))

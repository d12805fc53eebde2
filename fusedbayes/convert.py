"""Turning a deterministic network into a Bayesian one, and back."""

import fnmatch
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from fusedbayes import reference
from fusedbayes.arguments import check_estimator
from fusedbayes.checks import check_module, check_number, describe
from fusedbayes.diagnostics import Report
from fusedbayes.nn import LAYERS
from fusedbayes.nn.module import BayesModule
from fusedbayes.nn.traverse import qualified_name, variational_parameters
from fusedbayes.reference import Estimator

Where = Callable[[str, nn.Module], bool] | str | type[nn.Module] | Iterable[str | type[nn.Module]]


class ConversionRow(NamedTuple):
    """One module in the report of `to_bayesian`, which names each that holds parameters of its own.

    Attributes:
        name: qualified name; the root's is "".
        module: name of its class before.
        outcome: name of the Bayesian class that it became, or why it was left alone.
    """

    name: str
    module: str
    outcome: str


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
    return_report: bool = False,
) -> Any:
    """Makes every layer of `model` that has a Bayesian counterpart Bayesian, in place.

    The module objects stay and change their class, so that names, training mode, hooks, extra attributes and whoever
    holds them stay too. The weight and bias *are* the new ``weight_mu`` and ``bias_mu``, the same Parameter objects:
    values, dtype, device, requires_grad and tied weights stay as they are. An optimizer made before goes on training
    the means, but knows nothing of rho: make it afterwards. Layers that share a weight share its sigma and prior and
    are charged once.

    What cannot be converted is left alone and named in the report: a class without a counterpart, a subclass of one
    that has, because its forward may differ, and a layer that is lazy, reparametrised or patched.

    Args:
        model: any module, an nn.Linear too. It is changed and returned.
        where: which layers; None (default) all. A callable ``(name, module) -> bool``, a name or glob pattern of
            qualified names ("encoder.*"), a class, or several patterns and classes. The root's name is "".
        prior_mu, prior_sigma, sigma_init, estimator: as for the layers, see `fusedbayes.nn.BayesModule`. A layer that
            does not know the estimator keeps "shared".
        init: "mean" (default): prior and sigma from the arguments. "moped": the prior means become a copy of the
            weights, and sigma = delta * |w| (Krishnan, Subedar and Tickoo, "Specifying weight priors in Bayesian deep
            neural networks with empirical Bayes", AAAI 2020); for a network that is trained already.
        delta: for "moped", the ratio sigma / |w| (None means 0.1). Sigma is at least 1e-6, so that it can still be
            learnt where a weight is exactly 0.
        return_report: whether to return the report too (default False).

    Returns:
        `model`; or with the report ``(model, report)``, a `ConversionRow` for each module that holds parameters:
        ``print(report)`` shows a table.

    Raises:
        TypeError: `model` is not a module, or an argument is of the wrong type.
        ValueError: an argument is out of range; nothing can be converted; a layer that `where` picks is lazy,
            reparametrised or patched; the model is distributed already (DistributedDataParallel, FSDP), which would not
            see rho; or "moped" is combined with prior_mu or sigma_init. The model is unchanged then.
    """
    if init not in ("mean", "moped"):
        raise ValueError(f"init must be 'mean' or 'moped', got {init!r}")
    if init == "moped":
        delta = check_number(0.1 if delta is None else delta, "delta", positive=True)
        if sigma_init is not None or prior_mu != 0.0:
            raise ValueError("init='moped' sets prior_mu and sigma from the weights: leave prior_mu and sigma_init out")
    elif delta is not None:
        raise ValueError(f"delta is for init='moped', got delta={delta} with init={init!r}")
    check_estimator(estimator)
    options: dict[str, Any] = {"prior_mu": prior_mu, "prior_sigma": prior_sigma, "sigma_init": sigma_init}
    # Everything that can fail happens before the first change.
    counterparts = {layer.replaces: layer for layer in LAYERS}
    names, refusals = _select(model, counterparts, where)
    if init == "moped" and any(t.is_meta for module in names for t in module.parameters()):
        raise ValueError("init='moped' needs the values of the weights, but some are on the meta device")
    sources = {id(p.value.mu): (p.layer, p.name) for p in variational_parameters(model)}
    twins: dict[nn.Module, nn.Module] = {}
    with torch.inference_mode(False):  # an inference tensor could not be trained
        for module in names:
            layer = counterparts[type(module)]
            known = estimator if estimator in layer.estimators else "shared"
            for part, twin in _with_parts(module, layer.of(module, **options, estimator=known)):
                twins[part] = _initialised(twin, delta, sources)
    report = _report(model, twins, refusals)
    _convert(model, twins)
    return (model, report) if return_report else model


def to_deterministic(model: nn.Module) -> nn.Module:
    """Makes every Bayesian layer of `model` what it replaces, computing with its means, in place.

    The inverse of `to_bayesian`: ``weight_mu`` and ``bias_mu`` become the weight and bias, the same Parameter objects.

    Args:
        model: any module, a Bayesian layer too. It is changed and returned.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no Bayesian layer; one holds tensors of its own or is held by `frozen_sample` or
            `mean_mode`; or the model is distributed already. The model is unchanged then.
    """
    layers, _ = _select(model, LAYERS, None, every=True)
    return _convert(model, dict(pair for layer in layers for pair in _with_parts(layer, layer.deterministic())))


def _select(
    model: nn.Module, kinds: Collection[type[nn.Module]], where: Where | None, every: bool = False
) -> tuple[dict[Any, str], dict[str, str]]:
    """The modules of the classes `kinds` that `where` picks, by name; and why others that it picks cannot be converted.

    Raises:
        ValueError: there are none; or one that is asked for by name or class, or `every` one, cannot be converted.
    """
    check_module(model)
    wrappers = _distributed_wrappers()
    for module in model.modules():
        if isinstance(module, wrappers):
            wrapper = type(module).__name__
            raise ValueError(f"convert the model before distributing it: {wrapper} holds the parameters as they were")
    picks = _predicate(where)
    # Under each of its names: `where` may pick a shared module by any.
    named = model.named_modules(remove_duplicate=False)
    candidates = {name: module for name, module in named if _class_of(module) in kinds}
    chosen: dict[Any, str] = {}
    refusals: dict[str, str] = {}
    for name, module in candidates.items():
        if not picks(name, module):
            continue
        reason = _refusal(module)
        if reason is None:
            chosen.setdefault(module, name)
        elif where is not None or every:
            raise ValueError(f"{name!r} {reason}")
        else:
            refusals[name] = reason
    if not chosen:
        names = ", ".join(map(repr, list(candidates)[:8])) or "none"
        more = f" and {len(candidates) - 8} more" if len(candidates) > 8 else ""
        kind = "Bayesian layer" if every else "layer"
        reasons = "".join(f"; {name!r} {reason}" for name, reason in refusals.items())
        raise ValueError(f"where={where!r} picks no {kind} to convert; the model has: {names}{more}{reasons}")
    return chosen, refusals


def _report(model: nn.Module, twins: dict[nn.Module, nn.Module], refusals: dict[str, str]) -> Report[ConversionRow]:
    """A row for each deterministic module with parameters of its own."""
    reasons = {layer.replaces: "not picked" for layer in LAYERS}
    for layer in LAYERS:
        reasons |= {p.replaces: f"becomes Bayesian with the {layer.replaces.__name__}" for p in layer.parts.values()}

    def outcome(name: str, module: nn.Module) -> str:
        if module in twins:
            return type(twins[module]).__name__
        return "left alone: " + refusals.get(name, reasons.get(_class_of(module), "has no Bayesian counterpart"))

    return Report(
        ConversionRow(qualified_name(name), type(module).__name__, outcome(name, module))
        for name, module in model.named_modules()
        if any(p is not None for p in module._parameters.values()) and not isinstance(module, BayesModule)
    )


def _distributed_wrappers() -> tuple[type, ...]:
    # A model that is sharded has imported what shards it; importing it here would take a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = () if fsdp is None else (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)
    return nn.parallel.DistributedDataParallel, *sharded


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Its class; of a lazy or a parametrized one, which is refused later, the class that it stands for."""
    kind: Any = type(module)
    if isinstance(module, LazyModuleMixin) and kind.cls_to_become is not None:
        kind = kind.cls_to_become
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _with_parts(module: Any, twin: Any) -> Iterator[tuple[nn.Module, Any]]:
    """A module and its twin, and so the children of a layer that are converted along with it."""
    yield module, twin
    layer = twin if isinstance(twin, BayesModule) else module
    for name in layer.parts:
        yield from _with_parts(module.get_submodule(name), twin.get_submodule(name))


def _refusal(module: Any, layer: type[BayesModule] | None = None) -> str | None:
    """Why `module` cannot be converted, if it is not what its class says: that class's tensors and its forward."""
    if isinstance(module, LazyModuleMixin):
        return f"is an nn.{type(module).__name__} without weights yet: run one forward before converting"
    if "forward" in vars(module):
        return "has a forward of its own, which a converted layer would not compute"
    if isinstance(module, BayesModule):
        layer, own = type(module), ("mu", "rho", "prior_mu", "prior_sigma")
        expected = {f"{name}_{part}" for name in module.random_tensors for part in own}
    else:
        layer = layer or {layer.replaces: layer for layer in LAYERS}[_class_of(module)]
        expected = {*layer.tensors_of(module)}
    held = {*module._parameters, *module._buffers}
    if held != expected:
        # torch.nn.utils.weight_norm, pruning and parametrizations compute the weight from other tensors.
        return f"must hold {sorted(expected)} and no other tensors, got {sorted(held)}: remove reparametrisations first"
    for tensor in module._parameters.values():
        if tensor is not None and not tensor.is_floating_point():
            return f"must have floating-point weights, got dtype {tensor.dtype}"
    if isinstance(module, BayesModule) and module.is_held:
        return "cannot be converted inside frozen_sample or mean_mode"
    for name, part in layer.parts.items():
        child, kind = module._modules.get(name), part if isinstance(module, BayesModule) else part.replaces
        if type(child) is not kind:
            return f"must have a {kind.__name__} as {name!r}, got a {type(child).__name__}"
        if (reason := _refusal(child, part)) is not None:
            return f"has a child {name!r} that {reason}"
    return None


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


def _initialised(layer: BayesModule, delta: float | None, sources: dict[int, tuple[BayesModule, str]]) -> BayesModule:
    """The layer with the sigma and prior that it is to have; `sources` finds what was made of a mean before."""
    for name in layer.names():
        mean, _ = layer.posterior(name)
        first, first_name = sources.setdefault(id(mean), (layer, name))
        if first is not layer:
            for part in ("rho", "prior_mu", "prior_sigma"):
                setattr(layer, f"{name}_{part}", getattr(first, f"{first_name}_{part}"))
        elif delta is not None:
            values = mean.detach().to(reference.compute_dtype(mean))
            layer.set_prior(mean, layer.prior_sigma, name)
            layer.set_sigma((delta * values.abs()).clamp(min=1e-6), name)
    return layer


def _convert(model: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    """Makes each of `twins`' modules what its twin is; hooks, training mode and foreign attributes stay its own.

    The object itself changes its class, as torch's lazy and parametrized modules do: whoever holds it, a list, an
    optimizer's closure or a compiled wrapper, holds the converted layer.
    """
    for module, twin in twins.items():
        kinds = [kind for kind in (type(module), type(twin)) if issubclass(kind, BayesModule)]
        own = BayesModule.own_attributes.union(*(kind.derived_attributes for kind in kinds))
        for attribute in own:
            vars(module).pop(attribute, None)
        module.__class__ = type(twin)
        kept = {"_parameters", "_buffers", *own}
        vars(module).update({key: value for key, value in vars(twin).items() if key in kept})
    return model

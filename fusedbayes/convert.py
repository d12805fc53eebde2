"""Turning a deterministic network into a Bayesian one, and back."""

import fnmatch
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from fusedbayes import reference
from fusedbayes.checks import check_module, check_number, describe
from fusedbayes.nn.linear import BayesLinear
from fusedbayes.nn.module import BayesModule, variational_parameters

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
    estimator: str = "shared",
) -> nn.Module:
    """Replaces every `torch.nn.Linear` of `model` by a `BayesLinear`, in place.

    The old weight and bias *are* the new ``weight_mu`` and ``bias_mu``: the same Parameter objects, so that values,
    dtype, device, requires_grad, tied weights and optimizers that hold them stay as they are. Names, training mode,
    hooks and extra attributes stay too. Linears that share a weight share its sigma and prior and are charged once.
    Subclasses of nn.Linear are left alone, because their forward may differ; that includes the output projection of
    nn.MultiheadAttention, which therefore stays deterministic.

    Args:
        model: any module. It is changed and returned; if it is itself an nn.Linear, the return value replaces it.
        where: which layers; None (default) all. A callable ``(name, module) -> bool``, a name or glob pattern of
            qualified names ("encoder.*"), a class, or several patterns and classes. The root's name is "".
        prior_mu, prior_sigma, sigma_init, estimator: as for `BayesLinear`.
        init: "mean" (default): prior and sigma from the arguments. "moped": the prior means become a copy of the
            weights, and sigma = delta * |w| (Krishnan, Subedar and Tickoo, "Specifying weight priors in Bayesian deep
            neural networks with empirical Bayes", AAAI 2020); for a network that is trained already.
        delta: for "moped", the ratio sigma / |w| (None means 0.1). Sigma is at least 1e-6, so that it can still be
            learnt where a weight is exactly 0.

    Returns:
        `model`, or the replacement of a root that is an nn.Linear.

    Raises:
        TypeError: `model` is not a module, or an argument is of the wrong type.
        ValueError: an argument is out of range, nothing matches, a matching layer is a lazy one without weights yet,
            or "moped" is combined with prior_mu or sigma_init. The model is unchanged then.
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
    # Everything that can fail happens before the first replacement.
    sources = _random_tensors(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for linear in _select(model, nn.Linear, where):
        if init == "moped" and linear.weight.is_meta:
            raise ValueError("init='moped' needs the values of the weights, but some are on the meta device")
        replacements[linear] = _bayesian_linear(linear, options, delta, sources)
    return _replace(model, replacements)


def to_deterministic(model: nn.Module) -> nn.Module:
    """Replaces every `BayesLinear` of `model` by an `nn.Linear` that computes with its means, in place.

    The inverse of `to_bayesian`: ``weight_mu`` and ``bias_mu`` become the weight and bias, the same Parameter objects.

    Args:
        model: any module. It is changed and returned; if it is itself a BayesLinear, the return value replaces it.

    Returns:
        `model`, or the replacement of a root that is a BayesLinear.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no BayesLinear to replace.
    """
    return _replace(model, {layer: _linear(layer) for layer in _select(model, BayesLinear, None)})


def _select(model: nn.Module, kind: type[nn.Module], where: Where | None) -> list[Any]:
    """The modules of exactly the class `kind` that `where` picks; ValueError unless each can be converted."""
    check_module(model)
    picks = _predicate(where)
    # Under each of its names: `where` may pick a shared module by any.
    named = model.named_modules(remove_duplicate=False)
    candidates = {name: module for name, module in named if _is_plain(module, kind)}
    chosen = {name: module for name, module in candidates.items() if picks(name, module)}
    for name, module in chosen.items():
        _check_convertible(name, module)
    if not chosen:
        names = ", ".join(map(repr, candidates)) or "none"
        raise ValueError(f"where={where!r} picks no {kind.__name__} to convert; the model has: {names}")
    return list(dict.fromkeys(chosen.values()))


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is of the class `kind`; an nn.Linear may be lazy or parametrized, which is refused later."""
    if kind is nn.Linear and (isinstance(module, nn.LazyLinear) or parametrize.is_parametrized(module)):
        return isinstance(module, nn.LazyLinear) or type(module).__bases__ == (nn.Linear,)
    return type(module) is kind


def _check_convertible(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.LazyLinear):
        raise ValueError(f"{name!r} is an nn.LazyLinear without weights yet: run one forward before converting")
    if "forward" in vars(module):
        raise ValueError(f"{name!r} has a forward of its own, which a converted layer would not compute")
    if isinstance(module, nn.Linear) and (module._parameters.keys() != {"weight", "bias"} or module._buffers):
        # torch.nn.utils.weight_norm and pruning compute the weight from other tensors, in a hook.
        held = sorted([*module._parameters, *module._buffers])
        raise ValueError(f"{name!r} must hold a weight and a bias, got {held}: remove reparametrisations first")


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


def _random_tensors(model: nn.Module) -> dict[int, tuple[BayesModule, str]]:
    """The layers that an earlier conversion made random, by their means: a tied layer converted later joins them."""
    return {id(p.value.mu): (p.layer, p.name) for p in variational_parameters(model)}


def _bayesian_linear(
    linear: nn.Linear, options: dict[str, Any], delta: float | None, sources: dict[int, tuple[BayesModule, str]]
) -> BayesLinear:
    """The layer that takes `linear`'s place; `sources` finds the random tensor that was made of a mean before."""
    # On the meta device: the means are there already, the rest is filled in below.
    layer = BayesLinear(linear.in_features, linear.out_features, linear.bias is not None, **options, device="meta")
    _take_over(layer, linear)
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
        rho = reference.rho_from_sigma(sigma).to(mean.dtype)
        setattr(layer, f"{name}_rho", nn.Parameter(rho, requires_grad=mean.requires_grad))
    return layer


def _linear(layer: BayesLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias_mu is not None, device="meta")
    _take_over(linear, layer)
    linear.register_parameter("weight", layer.weight_mu)
    linear.register_parameter("bias", layer.bias_mu)
    return linear


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Gives `new` what `old` holds beyond its class: training mode, hooks and attributes set from outside.

    The hooks' own dictionaries move, so that their handles still remove them.
    """
    computed = {"_parameters", "_buffers", "_compiled_call_impl", *_constructed(type(old))}
    vars(new).update({key: value for key, value in vars(old).items() if key not in computed})


def _constructed(kind: type[nn.Module]) -> set[str]:
    """The attributes that the constructor of `kind` sets beyond those of every module."""
    return set(vars(kind(1, 1, device="meta"))) - set(vars(nn.Module()))


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    for old, new in replacements.items():
        hook: Any
        for hook in new._load_state_dict_pre_hooks.values():
            # These hooks know the module by a weak reference.
            if getattr(hook, "with_module", False) and hook.module() is old:
                hook.module = weakref.ref(new)
    model = replacements.get(model, model)
    for module in model.modules():
        for kind, (attribute, off) in _SHORTCUTS.items():
            if isinstance(module, kind):
                _set_shortcut(module, attribute, off)
    return model


def _set_shortcut(module: nn.Module, attribute: str, off: Any) -> None:
    kept = f"_{attribute}_before_fusedbayes"
    if any(isinstance(child, BayesLinear) for child in module.modules()):
        vars(module).setdefault(kept, getattr(module, attribute))
        setattr(module, attribute, off)
    elif kept in vars(module):
        setattr(module, attribute, vars(module).pop(kept))

"""Pruning: taking out the weights whose signal drowns in their noise."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedbayes import reference
from fusedbayes.checks import check_module, check_non_negative
from fusedbayes.diagnostics import Report
from fusedbayes.nn.module import BayesModule
from fusedbayes.nn.traverse import VariationalParameter, bayes_modules, identity


class PruneRow(NamedTuple):
    """One random tensor in the report of `prune`.

    Attributes:
        name: qualified name, such as "encoder.0.weight".
        size: number of weights.
        pruned: how many of them are pruned now, by this call or an earlier one.
        threshold: of the signal-to-noise ratio.
    """

    name: str
    size: int
    pruned: int
    threshold: float


@torch.no_grad()
def prune(
    model: nn.Module, *, snr: float | None = None, fraction: float | None = None, biases: bool = False
) -> Report[PruneRow]:
    """Prunes the weights of `model` whose signal-to-noise ratio |mu| / sigma is low, in place.

    What is left of a pruned weight: its mean is 0; its sigma is 2^-60, about 1e-18, in every draw, so that it counts
    for nothing beside any other number; the KL goes without it, `kl_loss` and `ELBO` alike; it gets no gradient, so
    that training can go on with the others. Which weights are pruned is in the state_dict (``weight_pruned``) and
    loads into a layer that was not pruned; `to_deterministic` makes exact zeros of them. Weights that were pruned
    before stay so; `BayesModule.set_pruned` takes any other mask, and takes it away. Nothing gets smaller or faster by
    itself, and the KL of a pruned model costs a pass of its own.

    Source: Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 5.1; Graves, "Practical
    variational inference for neural networks", NeurIPS 2011, section 4.

    Args:
        model: any module with Bayesian layers, trained. Weights that layers share are pruned once, for all of them.
        snr: prune what is below this ratio, 0 or more.
        fraction: in place of `snr`, the share of all weights of the model that is to be pruned, in [0, 1]: those
            with the lowest ratios, wherever they are; weights of the very same ratio at the threshold stay. Exactly
            one of `snr` and `fraction` is given.
        biases: whether tensors of one dimension are pruned and counted too (default False: they are few, and a unit
            without its bias is another unit).

    Returns:
        A `PruneRow` for each random tensor that was looked at; ``print(report)`` shows a table.

    Raises:
        TypeError: neither or both of `snr` and `fraction` are given, or one is not a number.
        ValueError: one is out of its range; the model has no Bayesian weights, or they are on the meta device or
            computed by a parametrization. `model` is unchanged then.
    """
    check_module(model)
    if (snr is None) == (fraction is None):
        raise TypeError("give exactly one of snr and fraction, got " + ("neither" if snr is None else "both"))
    if fraction is not None and check_non_negative(fraction, "fraction") > 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    groups = _groups(model, biases)
    ratios = [_signal_to_noise(group[0]) for group in groups]
    if fraction is not None:
        threshold = _quantile(ratios, fraction)
    else:
        assert snr is not None
        threshold = check_non_negative(snr, "snr")
    rows = []
    for group, ratio in zip(groups, ratios, strict=True):
        pruned, first = ratio < threshold, group[0]
        before = first.layer.pruned(first.name)
        pruned = pruned if before is None else pruned | before
        for parameter in group:
            parameter.layer.set_pruned(pruned, parameter.name)
        name = f"{first.layer_name}.{first.name}".lstrip(".")
        rows.append(PruneRow(name, pruned.numel(), int(pruned.sum()), threshold))
    return Report(rows)


def _groups(model: nn.Module, biases: bool) -> list[list[VariationalParameter]]:
    """The random tensors to prune, each with the layers that hold it."""
    groups: dict[tuple[object, object], list[VariationalParameter]] = {}
    for layer_name, layer in bayes_modules(model):
        for name in layer.names():
            if biases or layer.posterior(name)[0].dim() > 1:
                parameter = VariationalParameter(layer_name, layer, name)
                _check(parameter.layer, f"{layer_name}.{name}".lstrip("."), name)
                groups.setdefault(identity(layer, name), []).append(parameter)
    if not groups:
        raise ValueError("model has no Bayesian weights to prune: convert it with fusedbayes.to_bayesian, and train it")
    return list(groups.values())


def _check(layer: BayesModule, qualified: str, name: str) -> None:
    mu = layer._parameters.get(f"{name}_mu")
    if mu is None:
        raise ValueError(f"{qualified!r} is computed by a parametrization: remove it first")
    if mu.is_meta:
        raise ValueError(f"{qualified!r} is on the meta device and has no values")


def _signal_to_noise(parameter: VariationalParameter) -> Tensor:
    """|mu| / sigma of each weight; 0 of pruned ones."""
    mu, rho = parameter.layer.posterior(parameter.name)
    dtype = reference.compute_dtype(mu)
    return mu.to(dtype).abs() / reference.sigma_from_rho(rho.to(dtype))


def _quantile(ratios: list[Tensor], fraction: float) -> float:
    """The ratio below which this share of all lies."""
    every = torch.cat([ratio.flatten().to(ratios[0].device, torch.float64) for ratio in ratios])
    count = round(fraction * every.numel())
    return float("inf") if count == every.numel() else every.kthvalue(count + 1).values.item()

"""What to look at while a Bayesian network trains: KL, noise and gradients, layer by layer."""

from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fusedbayes import reference
from fusedbayes.checks import check_module, describe
from fusedbayes.nn.traverse import qualified_name, variational_parameters


class KLRow(NamedTuple):
    """One random tensor in a `kl_report`.

    Attributes:
        name: qualified name, such as "encoder.0.weight".
        size: number of weights.
        kl: KL in nats, summed.
        kl_per_weight: kl / size.
        sigma_min, sigma_median, sigma_max: of the posterior's standard deviations.
        snr_median: median signal-to-noise ratio |mu| / sigma.
    """

    name: str
    size: int
    kl: float
    kl_per_weight: float
    sigma_min: float
    sigma_median: float
    sigma_max: float
    snr_median: float


class GradientRow(NamedTuple):
    """One layer in a `gradient_balance`.

    Attributes:
        name: qualified name of the layer.
        nll, kl: 2-norms of the gradients of the two terms with respect to the layer's parameters.
        ratio: kl / nll; inf where nll is 0, nan where both are.
    """

    name: str
    nll: float
    kl: float
    ratio: float


Row = TypeVar("Row", bound=NamedTuple)


class Report(tuple[Row, ...], Generic[Row]):
    """A tuple of rows that prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "(no rows)"
        cells: list[list[str]] = [list(self[0]._fields)]
        for row in self:
            cells.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row])
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        for line in cells:
            line[0] = line[0].ljust(widths[0])
            line[1:] = map(str.rjust, line[1:], widths[1:])
        return "\n".join(map("  ".join, cells))


@torch.no_grad()
def kl_report(model: nn.Module) -> Report[KLRow]:
    """KL, KL per weight, sigma range and signal-to-noise ratio of every distinct random tensor of `model`.

    Args:
        model: any module.

    Returns:
        One `KLRow` for each random tensor, in the order of the modules; ``print(report)`` shows a table.

    Raises:
        TypeError: `model` is not a module.
    """

    def row(name: str, kl: Tensor, mu: Tensor, rho: Tensor) -> KLRow:
        mu = mu.to(reference.compute_dtype(mu))
        sigma = reference.sigma_from_rho(rho.to(mu.dtype))
        snr = mu.abs() / sigma
        values = (kl, kl / mu.numel(), sigma.min(), sigma.median(), sigma.max(), snr.median())
        return KLRow(name, mu.numel(), *(value.item() for value in values))

    return Report(
        row(f"{p.layer_name}.{p.name}".lstrip("."), p.layer.kl_of(p.name), p.mu, p.rho)
        for p in variational_parameters(model)
    )


def gradient_balance(model: nn.Module, nll: Tensor, kl: Tensor) -> Report[GradientRow]:
    """How hard the likelihood and the KL pull at each layer: the norms of their gradients.

    The values of the two terms say nothing about their balance: a constant in the KL has no gradient. Pass the terms
    as they stand in the loss, such as ``out.nll`` and ``kl_weight * out.kl / num_data``. The graph is kept and no
    ``.grad`` is touched, so ``loss.backward()`` may follow.

    Args:
        model: the module whose parameters are looked at, layer by layer (the module that holds them).
        nll, kl: scalars computed from `model` with gradients.

    Returns:
        One `GradientRow` for each layer with trainable parameters of its own; ``print(balance)`` shows a table.

    Raises:
        TypeError: `nll` or `kl` is not a tensor.
        ValueError: `nll` or `kl` is not a scalar with a gradient, or the model has nothing to train.
    """
    for name, value in (("nll", nll), ("kl", kl)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(value)}")
        if value.dim() != 0 or not value.requires_grad:
            grad = "" if value.requires_grad else " without gradient"
            raise ValueError(f"{name} must be a scalar with a gradient, got {describe(value)}{grad}")
    layers = list(_trainable(model))
    if not layers:
        raise ValueError("model has no parameter that requires grad")
    parameters = [p for _, owned in layers for p in owned]
    norms = []
    for term in (nll, kl):
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms.append([0.0 if grad is None else grad.to(reference.compute_dtype(grad)).norm().item() for grad in grads])
    rows, start = [], 0
    for name, owned in layers:
        end = start + len(owned)
        nll_norm, kl_norm = (torch.tensor(values[start:end]).norm().item() for values in norms)
        ratio = (torch.tensor(kl_norm) / torch.tensor(nll_norm)).item()
        rows.append(GradientRow(name, nll_norm, kl_norm, ratio))
        start = end
    return Report(rows)


def _trainable(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    seen: set[int] = set()
    check_module(model)
    for path, module in model.named_modules():
        owned = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen.update(map(id, owned))
        if owned:
            yield qualified_name(path), owned

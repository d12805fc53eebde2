"""Draws the figure of docs/estimators.md and prints its table: `python docs/draw_estimators.py`.

Linear regression with one Bayesian layer; the loss is half the mean squared error of a batch. What is measured is the
variance of its gradient by the layer's noise alone: the batch is held while the noise is drawn again and again.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import fusedbayes as fb
from fusedbayes.reference import ESTIMATORS

FIGURE = Path(__file__).parent / "figures" / "estimators.png"
INPUTS, ROWS = 20, 512
BATCH_SIZES = [2**i for i in range(10)]
MOST_BATCHES = 16  # of one size; fewer where they would overlap
DRAWS = 1600  # of the noise for each size, all its batches together
# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
STYLES = {"shared": ("#d55e00", "o"), "local": ("#0072b2", "s"), "flipout": ("#009e73", "^")}


def gradient(layer: fb.BayesLinear, x: Tensor, y: Tensor) -> Tensor:
    """By every parameter, one after another."""
    loss = 0.5 * (layer(x) - y).square().mean()
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(layer.parameters()))]).double()


def total_variance(layer: fb.BayesLinear, x: Tensor, y: Tensor, size: int) -> float:
    """The sum over the parameters of their gradients' variance, averaged over batches of `size` rows."""
    batches = list(zip(x.split(size), y.split(size), strict=True))[:MOST_BATCHES]
    variances = []
    for batch in batches:
        gradients = torch.stack([gradient(layer, *batch) for _ in range(DRAWS // len(batches))])
        variances.append(gradients.var(0).sum())
    return torch.stack(variances).mean().item()


def measure() -> dict[str, list[float]]:
    torch.manual_seed(0)
    x = torch.randn(ROWS, INPUTS)
    layer = fb.BayesLinear(INPUTS, 1, sigma_init=0.3)
    y = x @ torch.randn(INPUTS, 1) + 0.1 * torch.randn(ROWS, 1)
    variances: dict[str, list[float]] = {}
    for estimator in ESTIMATORS:
        layer.estimator = estimator
        variances[estimator] = [total_variance(layer, x, y, size) for size in BATCH_SIZES]
    return variances


def draw(variances: dict[str, list[float]]) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for estimator, values in variances.items():
        colour, marker = STYLES[estimator]
        axes.loglog(BATCH_SIZES, values, color=colour, marker=marker, base=2)
        axes.text(1.12 * BATCH_SIZES[-1], values[-1], estimator, color=colour, va="center", size=12)
    axes.set(xlim=(0.9, 1600), xlabel="rows in the batch", ylabel="total variance of the gradient")
    axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    axes.set_yscale("log", base=10)
    axes.minorticks_off()
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    measured = measure()
    shown = [0, 3, 6, 9]
    print("| rows | " + " | ".join(f'"{estimator}"' for estimator in measured) + " |")
    for i in shown:
        print(f"| {BATCH_SIZES[i]} | " + " | ".join(f"{values[i]:.3g}" for values in measured.values()) + " |")
    draw(measured)

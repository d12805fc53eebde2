"""How many weights of a Bayesian network are needed: accuracy on digits against the share of weights that is pruned.

Networks as in digits.py, with the prior and the tempering of that example, lose the weights with the lowest
signal-to-noise ratio |mu| / sigma, and for comparison those with the smallest |mu|, in steps. They are trained longer:
at first every sigma is the same, and it takes time until they differ. After section 5.1 of Blundell et al., "Weight
uncertainty in neural networks", ICML 2015. Runs on the GPU if there is one::

    python examples/pruning.py --out examples/output
"""

import argparse
import copy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from digits import Digits, load_data, make_mlp, train
from torch import Tensor, nn

import fusedbayes as fb
from fusedbayes.nn import VariationalParameter, variational_parameters
from fusedbayes.reference import sigma_from_rho

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975, 1.0)
BLUE, ORANGE = "#0072b2", "#d55e00"  # of Okabe and Ito's palette, which colour-blind readers can tell apart


def weights(model: nn.Module) -> list[VariationalParameter]:
    """The matrices, which are pruned; the biases stay."""
    return [p for p in variational_parameters(model) if p.name == "weight"]


def prune_by_magnitude(model: nn.Module, fraction: float) -> None:
    """As `fusedbayes.prune`, but by |mu| alone."""
    means = torch.cat([p.mu.abs().flatten() for p in weights(model)])
    count = round(fraction * means.numel())
    threshold = means.sort().values[count] if count < means.numel() else float("inf")
    for p in weights(model):
        p.layer.set_pruned(p.mu.abs() < threshold, p.name)


def accuracy(model: nn.Module, data: Digits) -> float:
    """Of the class probabilities averaged over 32 draws of the weights."""
    answer = fb.predict(model, data.x_test, num_samples=32, seed=0).mean_probs.argmax(-1)
    return (answer == data.y_test).float().mean().item()


def signal_to_noise(model: nn.Module) -> Tensor:
    return torch.cat([(p.mu.abs() / sigma_from_rho(p.rho)).flatten() for p in weights(model)]).detach().cpu()


def curves(model: nn.Module, data: Digits) -> tuple[list[float], list[float]]:
    """Accuracy at each of FRACTIONS, by signal-to-noise ratio and by magnitude."""
    by_ratio, by_magnitude = [], []
    for fraction in FRACTIONS:
        pruned = copy.deepcopy(model)
        fb.prune(pruned, fraction=fraction)
        by_ratio.append(accuracy(pruned, data))
        pruned = copy.deepcopy(model)
        prune_by_magnitude(pruned, fraction)
        by_magnitude.append(accuracy(pruned, data))
    return by_ratio, by_magnitude


def plot(ratios: Tensor, by_ratio: Tensor, by_magnitude: Tensor, path: Path) -> None:
    """Left the signal-to-noise ratios of all networks, right the accuracy of each network and the means."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    decibels = 20.0 * ratios.clamp(min=1e-6).log10()
    left.hist(decibels.numpy(), bins=80, range=(-80.0, 40.0), density=True, color=BLUE, alpha=0.35)
    left.set(
        xlabel="signal-to-noise ratio |mu| / sigma (dB: 20 log10)",
        ylabel="density of weights",
        title="What is in the networks",
    )
    cumulative = left.twinx()
    cumulative.plot(decibels.sort().values, torch.linspace(0.0, 1.0, len(decibels)), color=BLUE)
    cumulative.set(ylabel="share of weights below (line)", xlim=(-80.0, 40.0), ylim=(0.0, 1.02))
    for rows, colour, label in ((by_ratio, BLUE, "by |mu| / sigma"), (by_magnitude, ORANGE, "by |mu| alone")):
        right.plot(FRACTIONS, 100.0 * rows.T, color=colour, linewidth=0.8, alpha=0.4)
        right.plot(FRACTIONS, 100.0 * rows.mean(0), color=colour, linewidth=2.2, marker="o", markersize=4, label=label)
    right.set(
        xlabel="share of weights pruned",
        ylabel="accuracy on held-out digits (%)",
        title="What is needed",
        ylim=(80, 100),
    )
    right.legend(loc="lower left", frameon=False)
    right.grid(color="0.9")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="where the figure goes")
    parser.add_argument("--epochs", type=int, default=200, help="passes over the training set (default 200)")
    parser.add_argument("--networks", type=int, default=3, help="networks, each with a split of its own (default 3)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    ratios, by_ratio, by_magnitude = [], [], []
    for seed in range(arguments.networks):
        torch.manual_seed(seed)
        data = load_data(device, seed)
        model = fb.to_bayesian(make_mlp().to(device), prior_sigma=0.3)
        elbo = fb.ELBO(model, F.cross_entropy, num_data=len(data.x_train), kl_weight=fb.schedules.Tempered(0.1))
        train(elbo, model, data, arguments.epochs, f"network {seed}")
        ratios.append(signal_to_noise(model))
        for rows, row in zip((by_ratio, by_magnitude), curves(model, data), strict=True):
            rows.append(row)
    accuracies = [torch.tensor(rows) for rows in (by_ratio, by_magnitude)]

    print(f"\n{'pruned':>8}{'by |mu|/sigma':>16}{'by |mu|':>12}")
    means = torch.stack([rows.mean(0) for rows in accuracies])
    for fraction, (ratio, magnitude) in zip(FRACTIONS, means.T.tolist(), strict=True):
        print(f"{fraction:8.1%}{ratio:16.2%}{magnitude:12.2%}")
    print(f"\nthe last network, 80 % of it pruned\n{fb.prune(model, fraction=0.8)}\n")
    path = arguments.out / "pruning.png"
    plot(torch.cat(ratios), *accuracies, path)
    print(f"wrote {path}")
    dense, pruned = means[0][0].item(), means[0][FRACTIONS.index(0.8)].item()
    if dense < 0.97 or pruned < dense - 0.01:
        got = f"{dense:.2%} and {pruned:.2%}"
        raise SystemExit(f"expected accuracy >= 97 %, and at most 1 % less with 80 % of the weights pruned, got {got}")


if __name__ == "__main__":
    main()

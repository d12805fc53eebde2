"""Handwritten digits with a Bayesian network: convert, train by the ELBO, save, load, evaluate.

An ordinary MLP of nn.Linear is converted with one call, trained on scikit-learn's digits and asked two things: how well
it knows the held-out digits, and whether it knows when it does not know, on images it never saw the like of (the same
digits with their pixels shuffled). The same MLP trained by cross-entropy stands beside it. Runs on the GPU if there is
one::

    python examples/digits.py --out examples/output
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.calibration import calibration_curve
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy, multiclass_calibration_error
from tqdm import trange

import fusedbayes as fb

CLASSES = 10
BATCH = 128


class Digits(NamedTuple):
    """Training digits, held-out digits, and the held-out ones with their pixels shuffled: (images, 64) in [0, 1]."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    x_shuffled: Tensor


class Evaluation(NamedTuple):
    """Summaries of one network: its probabilities and entropies on held-out digits and on shuffled ones."""

    name: str
    probs: Tensor
    entropy: Tensor
    entropy_shuffled: Tensor
    accuracy: float
    nll: float
    ece: float
    auroc: float


def load_data(device: str, seed: int) -> Digits:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16.0, dtype=torch.float32)
    y = torch.tensor(labels)
    train, test = train_test_split(np.arange(len(y)), test_size=0.25, stratify=labels, random_state=seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([image[torch.randperm(64, generator=generator)] for image in x[test]])
    return Digits(*(t.to(device) for t in (x[train], y[train], x[test], y[test], shuffled)))


def make_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def train(elbo: fb.ELBO | None, model: nn.Module, data: Digits, epochs: int, name: str) -> None:
    """Trains by the ELBO, or by cross-entropy alone if there is none."""
    steps = -(-len(data.x_train) // BATCH)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * steps)
    progress = trange(epochs, desc=name, unit="epoch")
    for _ in progress:
        for batch in torch.randperm(len(data.x_train)).to(data.x_train.device).split(BATCH):
            x, y = data.x_train[batch], data.y_train[batch]
            loss = F.cross_entropy(model(x), y) if elbo is None else elbo(x, y).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def evaluate(name: str, model: nn.Module, data: Digits, num_samples: int) -> Evaluation:
    """Accuracy, NLL and ECE on held-out digits; AUROC of telling shuffled pixels from digits by predictive entropy."""
    if num_samples == 0:  # an ordinary network: its one output
        with torch.no_grad():
            digits, shuffled = (fb.Prediction(model(x)[None]) for x in (data.x_test, data.x_shuffled))
    else:
        digits, shuffled = (fb.predict(model, x, num_samples, seed=0) for x in (data.x_test, data.x_shuffled))
    probs = digits.mean_probs
    entropies = torch.cat([digits.predictive_entropy, shuffled.predictive_entropy])
    is_shuffled = torch.arange(len(entropies), device=entropies.device) >= len(probs)
    return Evaluation(
        name,
        probs.cpu(),
        digits.predictive_entropy.cpu(),
        shuffled.predictive_entropy.cpu(),
        accuracy=multiclass_accuracy(probs, data.y_test, CLASSES, average="micro").item(),
        nll=F.nll_loss(digits.log_mean_probs, data.y_test).item(),
        ece=multiclass_calibration_error(probs, data.y_test, CLASSES, n_bins=10).item(),
        auroc=binary_auroc(entropies, is_shuffled.long()).item(),
    )


def plot_reliability(evaluations: list[Evaluation], labels: Tensor, path: Path) -> None:
    """Share of right answers against confidence, in ten bins holding equally many digits."""
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0.5, 1.0], [0.5, 1.0], color="0.7", linestyle="--", label="perfectly calibrated")
    for evaluation in evaluations:
        confidence, answer = evaluation.probs.max(-1)
        right = (answer == labels.cpu()).numpy()
        observed, stated = calibration_curve(right, confidence.numpy(), n_bins=10, strategy="quantile")
        axes.plot(stated, observed, marker="o", label=f"{evaluation.name} (ECE {evaluation.ece:.3f})")
    axes.set(xlabel="confidence", ylabel="share of right answers", title="Reliability on held-out digits")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_entropies(evaluations: list[Evaluation], path: Path) -> None:
    """Histograms of predictive entropy: digits the network should know, shuffled pixels it cannot know."""
    figure, all_axes = plt.subplots(1, len(evaluations), figsize=(10, 4), sharey=True, layout="constrained")
    bins = np.linspace(0.0, np.log(CLASSES), 31)
    for axes, evaluation in zip(all_axes, evaluations, strict=True):
        axes.hist(evaluation.entropy.numpy(), bins, alpha=0.6, label="held-out digits")
        axes.hist(evaluation.entropy_shuffled.numpy(), bins, alpha=0.6, label="shuffled pixels")
        axes.axvline(np.log(CLASSES), color="0.7", linestyle="--", label="ln 10: no idea")
        axes.set(title=f"{evaluation.name} (AUROC {evaluation.auroc:.3f})", xlabel="predictive entropy (nats)")
    all_axes[0].set_ylabel("images")
    all_axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="where figures go")
    parser.add_argument("--epochs", type=int, default=80, help="passes over the training set (default 80)")
    parser.add_argument("--seed", type=int, default=0, help="of data split, initialisation and noise (default 0)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data(device, arguments.seed)
    print(f"{len(data.x_train)} digits to learn from, {len(data.x_test)} held out, on {device}")

    ordinary = make_mlp().to(device)
    train(None, ordinary, data, arguments.epochs, "ordinary")

    # The KL is tempered: 1347 images are few against 26,000 weights, and the full KL (weight 1) underfits them.
    model = fb.to_bayesian(make_mlp().to(device), prior_sigma=0.3)
    elbo = fb.ELBO(model, F.cross_entropy, num_data=len(data.x_train), kl_weight=fb.schedules.Tempered(0.1))
    train(elbo, model, data, arguments.epochs, "Bayesian")
    checkpoint = arguments.out / "digits.pt"
    torch.save(model.state_dict(), checkpoint)

    loaded = fb.to_bayesian(make_mlp().to(device))
    loaded.load_state_dict(torch.load(checkpoint))
    evaluations = [evaluate("ordinary", ordinary, data, 0), evaluate("Bayesian", loaded, data, 64)]

    print(f"\n{'network':10}{'accuracy':>10}{'NLL':>8}{'ECE':>8}{'OOD AUROC':>11}")
    for e in evaluations:
        print(f"{e.name:10}{e.accuracy:10.2%}{e.nll:8.3f}{e.ece:8.3f}{e.auroc:11.3f}")
    print(f"\nKL of the posterior from the prior (nats)\n{fb.kl_report(loaded)}\n")
    plot_reliability(evaluations, data.y_test, arguments.out / "reliability.png")
    plot_entropies(evaluations, arguments.out / "entropy.png")
    for name in ("digits.pt", "reliability.png", "entropy.png"):
        print(f"wrote {arguments.out / name}")
    bayesian = evaluations[-1]
    if bayesian.accuracy < 0.96 or bayesian.auroc < 0.95:
        got = f"{bayesian.accuracy:.2%}, {bayesian.auroc:.3f}"
        raise SystemExit(f"expected accuracy >= 96 % and AUROC >= 0.95, got {got}")


if __name__ == "__main__":
    main()

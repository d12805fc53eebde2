"""A small Bayesian convolutional network that sees its digits turned upside down.

An ordinary net of nn.Conv2d and nn.Linear is converted with one call and trained by the ELBO on scikit-learn's digits,
8 x 8 pixels each; the same net trained by cross-entropy stands beside it. Then the held-out digits are rotated, which
neither has seen: both read them worse and worse, and the question is whether they know. Runs on the GPU if there is
one::

    python examples/convnet.py --out examples/output
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from digits import CLASSES, Digits, load_data, train
from regression_1d import BLUE, ORANGE
from torch import Tensor, nn

import fusedbayes as fb

ANGLES = range(0, 181, 15)  # degrees
SIDE = 8  # pixels
SURE = 0.99
COLOURS = {"ordinary": ORANGE, "Bayesian": BLUE}


class Evaluation(NamedTuple):
    """Means over the held-out digits at each angle, (angles,), and over the wrong answers at all angles."""

    name: str
    accuracy: Tensor
    sure_and_wrong: Tensor
    nll: Tensor
    entropy: Tensor
    mutual_information: Tensor
    entropy_if_wrong: float


def make_convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * SIDE // 4 * SIDE // 4, CLASSES),
    )


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Images, (images, 64), turned about their centres: interpolated, and black where the corners came from outside."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = images.new_tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images.view(-1, 1, SIDE, SIDE), grid, align_corners=False).flatten(1)


def evaluate(name: str, model: nn.Module, data: Digits, num_samples: int) -> Evaluation:
    """How the network reads the held-out digits at each angle, and what it thinks of its answers."""
    summaries, entropies_if_wrong = [], []
    for angle in ANGLES:
        x = rotate(data.x_test, angle)
        if num_samples == 0:  # an ordinary network: its one output
            with torch.no_grad():
                prediction = fb.Prediction(model(x)[None])
        else:
            prediction = fb.predict(model, x, num_samples, seed=0)
        confidence, answer = prediction.mean_probs.max(-1)
        wrong = answer != data.y_test
        of_digits = (
            (~wrong).float(),
            (wrong & (confidence > SURE)).float(),
            F.nll_loss(prediction.log_mean_probs, data.y_test, reduction="none"),
            prediction.predictive_entropy,
            prediction.mutual_information,
        )
        summaries.append(torch.stack(of_digits).mean(1).cpu())
        entropies_if_wrong.append(prediction.predictive_entropy[wrong])
    return Evaluation(name, *torch.stack(summaries, dim=1), torch.cat(entropies_if_wrong).mean().item())


def plot(evaluations: list[Evaluation], digit: Tensor, path: Path) -> None:
    """One digit at each angle, and below it what the networks make of all held-out digits."""
    figure, panels = plt.subplot_mosaic(
        [["digit"] * 3, ["accuracy", "sure_and_wrong", "entropy"]],
        figsize=(12, 5.2),
        height_ratios=[1, 3.4],
        layout="constrained",
    )
    framed = [F.pad(rotate(digit[None], angle).view(SIDE, SIDE), (1, 1)) for angle in ANGLES]
    strip, step = torch.cat(framed, dim=1), SIDE + 2
    panels["digit"].imshow(strip.cpu().numpy(), cmap="gray_r")
    panels["digit"].set_xticks([step * (i + 0.5) - 0.5 for i in range(len(ANGLES))], [f"{a}°" for a in ANGLES])
    panels["digit"].set_yticks([])
    panels["digit"].tick_params(length=0)
    titles = {
        "accuracy": "Share of right answers",
        "sure_and_wrong": f"Share of answers wrong and {SURE:.0%} sure",
        "entropy": "Mean predictive entropy (nats)",
    }
    for name, title in titles.items():
        axes = panels[name]
        for e in evaluations:
            axes.plot(ANGLES, getattr(e, name).numpy(), color=COLOURS[e.name], marker="o", markersize=4, label=e.name)
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("rotation (degrees)", fontsize=12)
        axes.set(xticks=range(0, 181, 45), ylim=(0, None if name == "entropy" else 1.02))
    panels["accuracy"].legend(frameon=False, fontsize=12)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="where the figure goes")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training set (default 40)")
    parser.add_argument("--samples", type=int, default=64, help="draws of the weights in predictions (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of data split, initialisation and noise (default 0)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data(device, arguments.seed)

    ordinary = make_convnet().to(device)
    train(None, ordinary, data, arguments.epochs, "ordinary")

    model, conversion = fb.to_bayesian(make_convnet().to(device), return_report=True)
    print(f"\n{conversion}\n")
    # Tempered, as 1347 images are few against 15,000 weights: the full KL (weight 1) leaves nothing but the prior.
    elbo = fb.ELBO(model, F.cross_entropy, num_data=len(data.x_train), kl_weight=fb.schedules.Tempered(0.1))
    train(elbo, model, data, arguments.epochs, "Bayesian")

    evaluations = [evaluate("ordinary", ordinary, data, 0), evaluate("Bayesian", model, data, arguments.samples)]
    for e in evaluations:
        print(f"\n{e.name}, entropy of wrong answers {e.entropy_if_wrong:.3f}")
        print(f"{'degrees':>8}{'accuracy':>10}{'sure, wrong':>13}{'NLL':>8}{'entropy':>9}{'epistemic':>11}")
        for angle, right, sure, nll, entropy, epistemic in zip(ANGLES, *e[1:6], strict=True):
            print(f"{angle:8}{right:10.2%}{sure:13.2%}{nll:8.3f}{entropy:9.3f}{epistemic:11.3f}")
    path = arguments.out / "convnet.png"
    plot(evaluations, data.x_test[(data.y_test == 2).nonzero()[0, 0]], path)
    print(f"wrote {path}")
    ordinary_sure, sure = (e.sure_and_wrong.mean().item() for e in evaluations)
    if evaluations[1].accuracy[0] < 0.96 or sure > 0.7 * ordinary_sure:
        raise SystemExit(
            "expected accuracy >= 96 % before rotation, and wrong answers that are sure at most 0.7 times as often as "
            f"the ordinary network's, got {evaluations[1].accuracy[0]:.2%}, and {sure:.2%} against {ordinary_sure:.2%}"
        )


if __name__ == "__main__":
    main()

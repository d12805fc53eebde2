"""Noisy one-dimensional data with a gap: a small Bayesian MLP trained by the ELBO, once with each estimator.

The classic picture: the band of what the network does not know is narrow on the data and wide in the gap. The standard
deviation of the observation noise is known to the network, not learnt. Runs on the GPU if there is one::

    python examples/regression_1d.py --out examples/output
"""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import fusedbayes as fb
from fusedbayes.reference import ESTIMATORS, Estimator

NUM_DATA = 300
NOISE_SIGMA = 0.1
GAP = 0.7  # no data where |x| is smaller
END = 1.8  # nor where it is larger
WIDTH = 64
DRAWS = 5
BLUE, ORANGE = "#0072b2", "#d55e00"  # of Okabe and Ito's palette, which colour-blind readers can tell apart


class Data(NamedTuple):
    """Training and held-out data, and a grid for the curves: (rows, 1) each."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    grid: Tensor


class Evaluation(NamedTuple):
    """What a network says on the grid, and summaries: held-out RMSE and NLL, mean epistemic std by region."""

    estimator: Estimator
    seconds: float
    curves: fb.Prediction
    draws: Tensor
    rmse: float
    nll: float
    std_on_data: float
    std_in_gap: float


def function(x: Tensor) -> Tensor:
    return torch.sin(2.2 * x)


def load_data(device: str, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)

    def observations(rows: int) -> tuple[Tensor, Tensor]:
        x = GAP + (END - GAP) * torch.rand(rows, 1, generator=generator)
        x = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, -x, x)
        return x, function(x) + NOISE_SIGMA * torch.randn(rows, 1, generator=generator)

    grid = torch.linspace(-2.6, 2.6, 261)[:, None]
    return Data(*(t.to(device) for t in (*observations(NUM_DATA), *observations(1000), grid)))


class Bump(nn.Module):
    """exp(-z^2): a hidden unit speaks of one stretch of x, so that where there are no data some stay as they were."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.exp(-z.square())


def make_mlp(estimator: Estimator) -> nn.Sequential:
    """One hidden layer of bumps, whose places and widths come from the prior to begin with."""
    hidden = fb.BayesLinear(1, WIDTH, sigma_init=0.1, estimator=estimator)
    for name, prior_sigma in (("weight", 3.0), ("bias", 6.0)):
        hidden.set_prior(0.0, prior_sigma, name)
        nn.init.normal_(hidden.gaussian(name).mu, std=prior_sigma)
    return nn.Sequential(hidden, Bump(), fb.BayesLinear(WIDTH, 1, prior_sigma=0.5, estimator=estimator))


def nll(output: Tensor, y: Tensor) -> Tensor:
    """Negative log likelihood of each example in nats; `full` keeps the constant, log(2 pi) / 2."""
    return F.gaussian_nll_loss(output, y, torch.full_like(y, NOISE_SIGMA**2), full=True, reduction="none")


def train(model: nn.Module, data: Data, steps: int, name: str) -> None:
    """Full batches, and two draws of the weights for each, which run as one batch."""
    elbo = fb.ELBO(model, nll, num_data=NUM_DATA, num_samples=2)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=steps)
    progress = trange(steps, desc=name, unit="step", mininterval=0.5)
    for step in progress:
        loss = elbo(data.x_train, data.y_train).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def evaluate(model: nn.Sequential, data: Data, estimator: Estimator, seconds: float) -> Evaluation:
    # A curve is a function: every x has to see the same weights, whatever the network was trained with. Under "local"
    # and "flipout" each row has noise of its own: the same mean and spread at each x, but ragged lines.
    curves = fb.predict(model, data.grid, num_samples=500, seed=0, estimator="shared")
    held_out = fb.predict(model, data.x_test, num_samples=500, seed=0, estimator="shared")
    draws = []
    for sample in range(DRAWS):
        with torch.no_grad(), fb.frozen_sample(model, seed=0, sample=sample, estimator="shared"):
            draws.append(model(data.grid))
    log_likelihoods = torch.stack([-nll(output, data.y_test) for output in held_out.outputs])
    log_mean = log_likelihoods.logsumexp(0) - math.log(len(log_likelihoods))
    distance, std = data.grid.abs(), curves.epistemic_std
    return Evaluation(
        estimator,
        seconds,
        fb.Prediction(curves.outputs.cpu()),
        torch.stack(draws).cpu(),
        rmse=F.mse_loss(held_out.mean, data.y_test).sqrt().item(),
        nll=-log_mean.mean().item(),
        std_on_data=std[(distance >= GAP) & (distance <= END)].mean().item(),
        std_in_gap=std[distance <= GAP / 2].mean().item(),
    )


def plot(evaluations: list[Evaluation], data: Data, path: Path) -> None:
    figure, all_axes = plt.subplots(1, len(evaluations), figsize=(13, 4.6), sharey=True, layout="constrained")
    drawn = (data.grid, function(data.grid), data.x_train, data.y_train)
    x, truth, x_train, y_train = (t.flatten().cpu().numpy() for t in drawn)
    for axes, evaluation in zip(all_axes, evaluations, strict=True):
        curves = evaluation.curves
        mean = curves.mean.flatten().numpy()
        bands = ((curves.std(NOISE_SIGMA), 0.15, "2 std, with noise"), (curves.epistemic_std, 0.35, "2 std, epistemic"))
        for std, alpha, label in bands:
            half = 2.0 * std.flatten().numpy()
            axes.fill_between(x, mean - half, mean + half, color=BLUE, alpha=alpha, linewidth=0, label=label)
        lines = axes.plot(x, evaluation.draws.squeeze(-1).T.numpy(), color=ORANGE, linewidth=0.9, alpha=0.9)
        lines[0].set_label("draws of the function")
        axes.plot(x, mean, color=BLUE, linewidth=2.2, label="mean")
        axes.plot(x, truth, color="black", linestyle="--", linewidth=1.2, label="truth")
        axes.scatter(x_train, y_train, s=7, color="0.25", linewidth=0, zorder=3, label="data")
        axes.set_title(f'estimator="{evaluation.estimator}"', fontsize=14)
        axes.set_xlabel("x", fontsize=13)
        axes.set(xlim=(x[0], x[-1]), ylim=(-2.2, 2.2))
        axes.tick_params(labelsize=11)
    all_axes[0].set_ylabel("y", fontsize=13)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=12, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="where the figure goes")
    parser.add_argument("--steps", type=int, default=2500, help="steps of Adam for each estimator (default 2500)")
    parser.add_argument("--seed", type=int, default=0, help="of data, initialisation and noise (default 0)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data(device, arguments.seed)

    evaluations = []
    for estimator in ESTIMATORS:
        torch.manual_seed(arguments.seed)  # the same initial network for each
        model = make_mlp(estimator).to(device)
        begin = time.perf_counter()
        train(model, data, arguments.steps, f"{estimator:8}")
        evaluations.append(evaluate(model, data, estimator, time.perf_counter() - begin))

    print(f"\n{'estimator':11}{'seconds':>8}{'RMSE':>8}{'NLL':>8}{'std on data':>13}{'std in gap':>12}")
    for e in evaluations:
        print(f"{e.estimator:11}{e.seconds:8.1f}{e.rmse:8.3f}{e.nll:8.3f}{e.std_on_data:13.3f}{e.std_in_gap:12.3f}")
    path = arguments.out / "regression-1d.png"
    plot(evaluations, data, path)
    print(f"wrote {path}")
    for e in evaluations:
        if e.std_in_gap < 3.0 * e.std_on_data or e.rmse > 1.2 * NOISE_SIGMA:
            raise SystemExit(
                f"{e.estimator}: expected a std in the gap >= 3 times that on the data and RMSE <= "
                f"{1.2 * NOISE_SIGMA:.2f}, got {e.std_in_gap:.3f}, {e.std_on_data:.3f} and {e.rmse:.3f}"
            )


if __name__ == "__main__":
    main()

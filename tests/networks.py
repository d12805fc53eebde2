"""Small networks that several test files train, freeze or predict with."""

from typing import Any

import torch
from torch import Tensor, nn

from fusedbayes import BayesLinear, frozen_sample

NUM_DATA = 57
# Everything is float64: two ways to add up the same terms differ by a few hundred roundings of 1e-16 each.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def bayes(in_features: int, out_features: int, bias: bool = True) -> BayesLinear:
    return BayesLinear(in_features, out_features, bias, dtype=torch.float64)


def mlp() -> nn.Sequential:
    return nn.Sequential(bayes(5, 7), nn.Tanh(), bayes(7, 5, bias=False), nn.Tanh(), bayes(5, 3))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(11, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 3, (11,))


def network() -> nn.Sequential:
    return nn.Sequential(BayesLinear(5, 7), nn.Dropout(0.5), nn.ReLU(), BayesLinear(7, 3))


def draw(model: nn.Module, x: Tensor, seed: Any = 11, sample: int = 0) -> Tensor:
    with frozen_sample(model, seed, sample=sample):
        return model(x)

"""What is measured: networks, batch rows, precision, and the work that any implementation has to do."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LayerFactory = Callable[[int, int], nn.Module]

# Bytes per fp32 weight that a Bayesian linear layer must move: mu and rho read; for the backward pass read for dX and
# again for dmu and drho, which are written; Adam reads parameter, gradient and two moments and writes three of them,
# for mu and for rho.
FORWARD_BYTES = 8
BACKWARD_BYTES = 8 + 16
ADAM_BYTES = 2 * 28


@dataclass(frozen=True)
class Network:
    """A network of linear layers.

    Attributes:
        name: as the tables show it.
        layers: (in_features, out_features) of each layer.
        build: makes the network of layers that a factory makes.
    """

    name: str
    layers: tuple[tuple[int, int], ...]
    build: Callable[[LayerFactory], nn.Module]
    trains_before: bool = False  # something in front of the first layer learns, so that training needs its dX

    @property
    def in_features(self) -> int:
        return self.layers[0][0]

    @property
    def weights(self) -> int:
        """Weights and biases."""
        return sum(n * k + n for k, n in self.layers)


class TransformerBlock(nn.Module):
    """Pre-norm attention and a 4x MLP on one sequence, (tokens, width)."""

    def __init__(self, make: LayerFactory, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.projection = make(width, 3 * width), make(width, width)
        self.mlp = nn.Sequential(make(width, 4 * width), nn.GELU(), make(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(tokens, 3, self.heads, -1).permute(1, 2, 0, 3)
        x = x + self.projection(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(tokens, width))
        return x + self.mlp(self.norms[1](x))


def square(width: int) -> Network:
    """One layer of `width` inputs and outputs."""
    return Network(f"{width} x {width}", ((width, width),), lambda make: make(width, width))


def mlp(*widths: int) -> Network:
    """Linear layers with ReLU between them."""
    layers = tuple(itertools.pairwise(widths))

    def build(make: LayerFactory) -> nn.Module:
        modules = [module for k, n in layers for module in (make(k, n), nn.ReLU())]
        return nn.Sequential(*modules[:-1])

    return Network("MLP " + "-".join(map(str, widths)), layers, build)


def block(width: int) -> Network:
    """The linear layers of a transformer block: qkv, projection, 4x MLP."""
    layers = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return Network(f"block {width}", layers, lambda make: TransformerBlock(make, width, heads=16), trains_before=True)


@dataclass(frozen=True)
class Case:
    """One measurement, to be made for every implementation.

    Attributes:
        group: "forward" and "forward with KL" (without gradients), "forward+backward" (with the KL), "training step"
            (with Adam) or "prediction" (samples of the weights, without gradients).
        network, rows: what runs on how many rows.
        precision: "fp32", or "bf16" for autocast over fp32 parameters.
        samples: Monte Carlo samples, for "prediction".
    """

    group: str
    network: Network
    rows: int
    precision: str = "fp32"
    samples: int = 1

    @property
    def name(self) -> str:
        """The case within its group."""
        samples = f", {self.samples} samples" if self.group == "prediction" else ""
        return f"{self.network.name}, {self.rows} rows{samples}, {self.precision}"

    @property
    def trains(self) -> bool:
        return self.group in ("forward+backward", "training step")

    @property
    def with_kl(self) -> bool:
        return self.trains or self.group == "forward with KL"

    @property
    def flop(self) -> int:
        """Floating-point operations of the layers' matrix products: a multiplication and an addition each."""
        products = 3 if self.trains else self.samples
        return sum(2 * self.rows * n * k * products for k, n in self.network.layers) - 2 * self.rows * self._without_dx

    @property
    def _without_dx(self) -> int:
        """Weights of the first layer if nobody wants the gradient of its input."""
        k, n = self.network.layers[0]
        return k * n if self.group == "training step" and not self.network.trains_before else 0

    @property
    def bytes(self) -> int:
        """Bytes of parameters and activations that must move; all samples share one read of mu and rho."""
        per_weight = FORWARD_BYTES
        if self.trains:
            per_weight += BACKWARD_BYTES
        if self.group == "training step":
            per_weight += ADAM_BYTES
        activation = 4 if self.precision == "fp32" else 2
        passes = 3 if self.trains else self.samples
        activations = sum(self.rows * (k + n) * activation * passes for k, n in self.network.layers)
        return per_weight * self.network.weights - 8 * self._without_dx + activations

    def input(self, device: str) -> Tensor:
        """The same numbers at every call."""
        generator = torch.Generator(device).manual_seed(1)
        return torch.randn(self.rows, self.network.in_features, device=device, generator=generator)


MNIST = mlp(784, 400, 400, 10)
WIDE = mlp(2048, 2048, 2048, 2048)
GROUPS = ("forward", "forward with KL", "forward+backward", "training step", "prediction")


def quick_cases() -> list[Case]:
    """What `make bench` measures: a few minutes on two cores."""
    return [
        *(Case("forward", square(1024), rows) for rows in (1, 16, 256)),
        Case("forward with KL", square(2048), 1),  # sampling and the KL, next to nothing else
        *(Case("forward+backward", square(1024), rows) for rows in (16, 256)),
        Case("forward+backward", square(1024), 256, "bf16"),
        Case("forward+backward", WIDE, 64),
        Case("forward+backward", MNIST, 128),
        Case("training step", MNIST, 128),
        *(Case("prediction", MNIST, 128, samples=samples) for samples in (1, 8)),
        Case("prediction", square(2048), 16, samples=32),
    ]


def full_cases(largest: int) -> list[Case]:
    """Everything, for square layers up to `largest`, what tells most first: time may run out."""
    rows = (1, 16, 64, 256, 1024, 4096)
    passes = ("forward", "forward+backward")
    cases = []
    for precision in ("bf16", "fp32"):
        cases += [Case(group, square(4096), r, precision) for group in passes for r in rows]
        cases += [Case(group, block(1024), 2048, precision) for group in (*passes, "training step")]
        cases += [Case(group, MNIST, 128, precision) for group in (*passes, "training step")]
        cases += [
            Case("prediction", network, 16, precision, s) for network in (square(4096), MNIST) for s in (1, 8, 32)
        ]
    for width in (2048, 1024, 8192):
        if width <= largest:
            cases += [Case(g, square(width), r, p) for p in ("bf16", "fp32") for g in passes for r in rows]
    return cases

"""Every kind of Bayesian layer in a small instance, for the laws that all of them keep."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fusedbayes as fb
from fusedbayes.nn import BayesModule


class Kind(NamedTuple):
    """A layer and what it is called on.

    Attributes:
        layer: its class.
        arguments: of its constructor, and of the class that it replaces.
        input: makes an input of a batch of at least two.
        linear: whether its output is linear in its random tensors, which then are all that its moments depend on.
        call: of a module on an input; returns one tensor, whose dimension 0 is the batch.
        backend: of torch.compile, on the CPU with gradients.
    """

    layer: type[BayesModule]
    arguments: dict[str, Any]
    input: Callable[[], Tensor]
    linear: bool = True
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)
    backend: str = "aot_eager"

    def __str__(self) -> str:
        return self.layer.__name__

    def make(self, **options: Any) -> "Model":
        """A model that is this layer, with parameters that all differ and sigmas of about 0.2."""
        model = Model(self.layer(**self.arguments, **options), self)
        with torch.no_grad():
            for name in model.layer.names():
                mu, rho = model.layer.posterior(name)
                if not mu.is_meta:
                    rho.uniform_(-2.5, -1.0)
        return model

    def batch(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """An input, of this dtype if it is not of indices."""
        x = self.input()
        return x.to(dtype) if x.is_floating_point() else x


class Model(nn.Module):
    """Calls a layer, Bayesian or not, as its kind is called."""

    def __init__(self, layer: Any, kind: Kind) -> None:
        super().__init__()
        self.layer = layer
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.call(self.layer, x)


def convolution(spatial: tuple[int, ...], **arguments: Any) -> tuple[dict[str, Any], Callable[[], Tensor]]:
    channels = {"in_channels": 4, "out_channels": 6}
    return channels | {"kernel_size": 3} | arguments, lambda: torch.randn(3, 4, *spatial)


def recurrent(**arguments: Any) -> tuple[Any, ...]:
    sizes = {"input_size": 3, "hidden_size": 2, "batch_first": True}
    return sizes | arguments, lambda: torch.randn(3, 2, 3), False, lambda module, x: module(x)[0]


KINDS = (
    Kind(fb.BayesLinear, {"in_features": 5, "out_features": 3}, lambda: torch.randn(4, 5)),
    Kind(fb.BayesConv1d, *convolution((7,), padding="same", padding_mode="circular", dilation=2)),
    Kind(fb.BayesConv2d, *convolution((5, 6), stride=2, padding=(1, 2), padding_mode="reflect", groups=2)),
    Kind(fb.BayesConv3d, *convolution((3, 4, 3), kernel_size=2, padding=1, padding_mode="replicate")),
    Kind(fb.BayesConvTranspose1d, *convolution((5,), stride=3, output_padding=2, dilation=2)),
    Kind(fb.BayesConvTranspose2d, *convolution((3, 4), stride=(2, 1), padding=1, output_padding=(1, 0), groups=2)),
    Kind(fb.BayesConvTranspose3d, *convolution((2, 3, 2), kernel_size=(1, 2, 2), bias=False)),
    # Beyond "eager" torch 2.13 cannot compile its own LSTM of float32.
    Kind(fb.BayesLSTM, *recurrent(bidirectional=True), backend="eager"),
    Kind(fb.BayesGRU, *recurrent(bias=False)),
    Kind(fb.BayesRNN, *recurrent(nonlinearity="relu")),
    Kind(
        fb.BayesMultiheadAttention,
        {"embed_dim": 8, "num_heads": 2, "batch_first": True, "add_bias_kv": True},
        lambda: torch.randn(3, 4, 8),
        linear=False,
        call=lambda module, x: module(x, x, x)[0],
    ),
    Kind(
        fb.BayesEmbedding,
        {"num_embeddings": 7, "embedding_dim": 5, "padding_idx": 2},
        lambda: torch.tensor([[1, 2, 1], [6, 0, 6]]),
    ),
)

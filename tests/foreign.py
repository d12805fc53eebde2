"""The layers of other libraries, for tests that compare with them; a test is skipped where its package is missing."""

import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# The names of a mean and its scale, in the layers that the tests make.
PARTS = (
    *(("mu_weight", "rho_weight"), ("mu_kernel", "rho_kernel"), ("mu_bias", "rho_bias")),
    *(("weight_mu", "weight_log_sigma"), ("bias_mu", "bias_log_sigma")),
    *(("weight_mu", "weight_rho"), ("bias_mu", "bias_rho")),
    *(("weight_mu", "weight_sigma"), ("bias_mu", "bias_sigma")),
)


def module(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that torch has moved
        return pytest.importorskip(name)


@functools.cache
def _without_its_packages(package: str) -> None:
    """Lets its modules be imported without what its packages import: for torch-uncertainty Lightning, torchvision..."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    for name in ("", ".layers", ".losses", ".utils"):
        stub = types.ModuleType(package + name)
        stub.__path__ = [str(Path(spec.origin).parent.joinpath(name.lstrip(".")))]
        sys.modules[stub.__name__] = stub


def torch_uncertainty(name: str) -> Any:
    _without_its_packages("torch_uncertainty")
    return module(f"torch_uncertainty.{name}")


def layer(library: str, kind: str, *sizes: Any, prior: tuple[float, float], **options: Any) -> Any:
    """A layer with this Normal prior, centred where the library has no other; sigma's logarithm is -2 +- 1."""
    mean, sigma = prior
    if library == "bayesian-torch":
        options = {
            "prior_mean": mean,
            "prior_variance": sigma,
            "posterior_mu_init": 0,
            "posterior_rho_init": 0,
            **options,
        }
        made = getattr(module("bayesian_torch.layers"), kind)(*sizes, **options)
        made.dnn_to_bnn_flag = True  # the output alone, without the KL
    elif library == "torchbnn":
        made = getattr(module("torchbnn"), kind)(mean, sigma, *sizes, **options)
    elif library == "blitz":
        made = getattr(module("blitz.modules"), kind)(*sizes, prior_sigma_1=sigma, **options)
    else:
        made = getattr(torch_uncertainty("layers.bayesian"), kind)(*sizes, prior_sigma_1=sigma, **options)
    with torch.no_grad():
        for _, scale in tensors(made):
            scale.normal_(-2.0, 1.0)
    return made


def tensors(layer: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and scale of each tensor that the layer uses, without those of layers in it."""
    parameters = dict(layer.named_parameters(recurse=False))
    for mu, scale in PARTS:
        if scale in parameters and not ("bias" in mu and getattr(layer, "bias", None) is False):
            yield parameters[mu], parameters[scale]


def without_noise(model: nn.Module) -> nn.Module:
    """The same model with every sigma 0 in float32, so that its forward computes with the means."""
    with torch.no_grad():
        for part in model.modules():
            for _, scale in tensors(part):
                scale.fill_(-200.0)
    return model


def names(layer: nn.Module) -> tuple[str, str]:
    """What `fusedbayes.load_foreign` takes for mean and scale of the layer's weight."""
    parameters = dict(layer.named_parameters())
    if "weight_sampler.eps_w" in layer.state_dict():
        return "weight_sampler.mu", "weight_sampler.rho"
    return next(pair for pair in PARTS if pair[1] in parameters)

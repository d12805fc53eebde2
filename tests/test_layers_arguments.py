"""Whatever a constructor of torch's takes, its Bayesian counterpart takes: convert, compare, look, and go back."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusedbayes as fb
from fusedbayes.reference import ESTIMATORS

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Draw = Any  # what hypothesis hands to a composite strategy


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def per_dimension(draw: Draw, dims: int, values: st.SearchStrategy[int]) -> int | tuple[int, ...]:
    """One number for all spatial dimensions, or one for each."""
    return draw(st.one_of(values, st.tuples(*[values] * dims)))


def spread(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else value


def common(draw: Draw, dims: int) -> dict[str, Any]:
    """Arguments of convolutions and of transposed ones."""
    groups = draw(st.integers(1, 3))
    return {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": per_dimension(draw, dims, st.integers(1, 3)),
        "stride": per_dimension(draw, dims, st.integers(1, 3)),
        "dilation": per_dimension(draw, dims, st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }


def batch(draw: Draw, channels: int, sizes: list[int]) -> Tensor:
    leading = draw(st.sampled_from([(), (1,), (2,)]))
    return torch.randn(*leading, channels, *sizes)


@st.composite
def convolutions(draw: Draw) -> tuple[nn.Module, tuple[Any, ...]]:
    dims = draw(st.integers(1, 3))
    arguments = common(draw, dims)
    arguments["padding"] = draw(st.sampled_from(["same", "valid", None]))
    if arguments["padding"] is None:
        arguments["padding"] = per_dimension(draw, dims, st.integers(0, 2))
    elif arguments["padding"] == "same":
        arguments["stride"] = 1
    arguments["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    # Large enough for the kernel, and for what is reflected.
    sizes = [draw(st.integers(5, 6)) for _ in range(dims)]
    return CONVOLUTIONS[dims - 1](**arguments), (batch(draw, arguments["in_channels"], sizes),)


@st.composite
def transposed_convolutions(draw: Draw) -> tuple[nn.Module, tuple[Any, ...]]:
    dims = draw(st.integers(1, 3))
    arguments = common(draw, dims)
    strides, dilations = spread(arguments["stride"], dims), spread(arguments["dilation"], dims)
    most = [max(pair) - 1 for pair in zip(strides, dilations, strict=True)]
    arguments["output_padding"] = draw(st.tuples(*(st.integers(0, limit) for limit in most)))
    arguments["padding"] = per_dimension(draw, dims, st.integers(0, 1))
    module = TRANSPOSED[dims - 1](**arguments)
    inputs = (batch(draw, arguments["in_channels"], [draw(st.integers(3, 4)) for _ in range(dims)]),)
    fits = all(extra < stride for extra, stride in zip(arguments["output_padding"], strides, strict=True))
    if fits and draw(st.booleans()):
        inputs += (list(module(*inputs).shape[-dims:]),)  # output_size
    return module, inputs


@st.composite
def embeddings(draw: Draw) -> tuple[nn.Module, tuple[Any, ...]]:
    rows = draw(st.integers(1, 6))
    module = nn.Embedding(
        rows,
        draw(st.integers(1, 5)),
        padding_idx=draw(st.one_of(st.none(), st.integers(-rows, rows - 1))),
        max_norm=draw(st.one_of(st.none(), st.floats(0.5, 2.0))),
        norm_type=draw(st.sampled_from([1.0, 2.0, math.inf])),
        scale_grad_by_freq=draw(st.booleans()),
        sparse=draw(st.booleans()),
    )
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return module, (torch.randint(0, rows, shape, dtype=draw(st.sampled_from([torch.int32, torch.int64]))),)


@st.composite
def recurrent(draw: Draw) -> tuple[nn.Module, tuple[Any, ...]]:
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    hidden, layers = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    arguments = {
        "num_layers": layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.5])) if layers > 1 else 0.0,
    }
    if kind is nn.LSTM:
        arguments["proj_size"] = draw(st.integers(0, hidden - 1))
    if kind is nn.RNN:
        arguments["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    features = draw(st.integers(1, 3))
    leading = draw(st.sampled_from([(3,), (2, 3), (1, 1)]))
    return kind(features, hidden, **arguments).eval(), (torch.randn(*leading, features),)


@st.composite
def attentions(draw: Draw) -> tuple[nn.Module, tuple[Any, ...]]:
    heads = draw(st.integers(1, 3))
    dim = heads * draw(st.integers(1, 3))
    kdim, vdim = (draw(st.one_of(st.none(), st.integers(1, 4))) for _ in range(2))
    flags = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    leading = draw(st.sampled_from([(3,), (2, 3)]))
    query, key, value = (torch.randn(*leading, size or dim) for size in (dim, kdim, vdim))
    module = nn.MultiheadAttention(dim, heads, dropout=0.5, kdim=kdim, vdim=vdim, **flags)
    return module.eval(), (query, key, value)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    case=st.one_of(convolutions(), transposed_convolutions(), embeddings(), recurrent(), attentions()),
    estimator=st.sampled_from(ESTIMATORS),
)
def test_any_arguments(case: tuple[nn.Module, tuple[Any, ...]], estimator: Any) -> None:
    original, inputs = case
    before = copy.deepcopy(original)
    # max_norm changes the table: each call on its own.
    expected = copy.deepcopy(original)(*inputs)
    layer = fb.to_bayesian(original, sigma_init=1e-30, estimator=estimator)
    assert type(layer).__name__ == f"Bayes{type(before).__name__}"
    assert layer.extra_repr().startswith(", ".join(filter(None, (before.extra_repr(), "prior_mu=0, prior_sigma="))))
    assert_equal(copy.deepcopy(layer)(*inputs), expected)
    assert layer.kl_loss().isfinite()
    back = fb.to_deterministic(layer)
    assert type(back) is type(before)
    assert repr(back) == repr(before)
    assert_equal(dict(back.state_dict()), dict(before.state_dict()))
    assert_equal(back(*inputs), expected)

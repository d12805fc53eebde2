"""What convolutions have of their own: fan-in, where their noise lies, examples without a batch, output sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedbayes as fb
from fusedbayes import noise, reference
from fusedbayes.noise import Role
from fusedbayes.reference import ESTIMATORS, Estimator

STREAM = 0  # of the weight of a layer by itself


def frozen(layer: nn.Module, x: torch.Tensor, **options: Any) -> torch.Tensor:
    with fb.frozen_sample(layer, 3, **options):
        return layer(x)


def address(layer: Any) -> noise.Address:
    with fb.frozen_sample(layer, 3):
        return layer._noises[-1].addresses["weight"]


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (fb.BayesConv2d(4, 6, (3, 2), groups=2, device="meta"), 2 * 6),
        (fb.BayesConv1d(4, 6, 5, stride=3, dilation=2, device="meta"), 4 * 5),
        (fb.BayesConvTranspose2d(4, 6, 3, groups=2, device="meta"), 2 * 9),
        # Each output is reached by every second tap, at most.
        (fb.BayesConvTranspose1d(4, 6, 4, stride=2, device="meta"), 4 * 2),
        (fb.BayesConvTranspose1d(4, 6, 5, stride=2, device="meta"), 4 * 3),
        (fb.BayesConvTranspose1d(4, 6, 3, stride=5, device="meta"), 4),
        # With a dilation as large as the stride every tap reaches the same outputs.
        (fb.BayesConvTranspose1d(4, 6, 3, stride=2, dilation=2, device="meta"), 4 * 3),
        (fb.BayesConvTranspose1d(4, 6, 3, stride=4, dilation=2, device="meta"), 4 * 2),
    ],
    ids=repr,
)
def test_fan_in_is_the_most_inputs_that_an_output_adds_up(layer: Any, fan_in: int) -> None:
    assert layer.fan_in == fan_in
    assert layer.prior_sigma == pytest.approx(fan_in**-0.5)
    assert layer.sigma_init == pytest.approx(0.1 * fan_in**-0.5)
    # Counted: ones convolved with ones.
    ones = layer.deterministic().to_empty(device="cpu")
    nn.init.ones_(ones.weight)
    nn.init.zeros_(ones.bias)
    x = torch.ones(1, layer.in_channels, *[9] * len(layer.kernel_size))
    assert ones(x).max().item() == fan_in


def test_weights_are_those_of_their_address() -> None:
    layer = fb.BayesConv2d(3, 4, 3, bias=False)
    x = torch.randn(2, 3, 6, 5)
    weight = reference.sample_weight(*layer.posterior("weight"), torch.tensor(3), 2, address(layer))
    # Two backends of the noise differ by 1e-5 times sigma.
    torch.testing.assert_close(frozen(layer, x, sample=2), F.conv2d(x, weight), rtol=1e-5, atol=1e-5)


def test_zeta_has_a_row_for_each_example_and_a_column_for_each_of_its_outputs() -> None:
    layer = fb.BayesConv2d(3, 4, 3, estimator="local", sigma_init=0.3)
    x = torch.randn(2, 3, 6, 5)
    (mu, rho), (bias_mu, bias_rho) = layer.posterior("weight"), layer.posterior("bias")
    mean = F.conv2d(x, mu, bias_mu)
    std = F.conv2d(x.square(), F.softplus(rho).square(), F.softplus(bias_rho).square()).sqrt()
    zeta = noise.normal(3, 2, 4 * 4 * 3, sample=2, stream=address(layer).stream + Role.LOCAL).view(mean.shape)
    torch.testing.assert_close(frozen(layer, x, sample=2), mean + std * zeta, rtol=1e-5, atol=1e-4)


def test_flipout_draws_one_convolution_for_each_example() -> None:
    """Positions of an example that look alike have one output; under local, which draws each output, they do not."""
    layer = fb.BayesConv2d(3, 4, 1, sigma_init=0.5)
    x = torch.randn(5, 3, 1, 1).expand(5, 3, 4, 4)
    for estimator in ESTIMATORS:
        layer.estimator = estimator
        spread = (layer(x).flatten(2).std(2) > 1e-6).any()
        assert spread == (estimator == "local")
    # And examples that look alike do not.
    layer.estimator = "flipout"
    assert (layer(x[:1].expand(5, 3, 4, 4)).std(0) > 1e-3).any()


def test_flipout_does_not_lose_a_small_sigma_beside_a_large_mean() -> None:
    """Where the mean cancels out, what is left is sigma eps to its own precision: not the rounding of W."""
    layer = fb.BayesConv1d(2, 1, 1, bias=False, estimator="flipout", sigma_init=1e-3)
    with torch.no_grad():
        layer.weight_mu.copy_(torch.tensor([[[1e4], [-1e4]]]))
    x = torch.ones(1, 2, 6)
    twin = fb.BayesConv1d(2, 1, 1, bias=False, estimator="flipout", dtype=torch.float64)
    twin.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    exact = frozen(twin, x.double())
    assert exact.abs().max() > 1e-5
    # eps is off by 1e-5 at most, and a few roundings.
    torch.testing.assert_close(frozen(layer, x).double(), exact, rtol=1e-5, atol=1e-3 * 4e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("layer", [fb.BayesConv2d(3, 4, 3), fb.BayesConvTranspose1d(3, 4, 3)], ids=repr)
def test_an_example_without_a_batch_is_the_first_of_a_batch(layer: Any, estimator: Estimator) -> None:
    layer.estimator = estimator
    x = torch.randn(2, 3, *[5] * len(layer.kernel_size))
    torch.testing.assert_close(frozen(layer, x[0]), frozen(layer, x)[0], rtol=1e-5, atol=1e-5)


def test_samples_of_an_example_without_a_batch_are_refused_as_one_batch() -> None:
    layer, x = fb.BayesConv1d(3, 3, 3), torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"BayesConv1d got \(6, 5\), whose dimension 0 is no batch.*samples_at_once=1"):
        fb.predict(layer, x, 2)
    assert fb.predict(layer, x, 2, samples_at_once=1).outputs.shape == (2, 3, 3)


def test_output_size() -> None:
    layer = fb.BayesConvTranspose2d(3, 4, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 4, 4)
    for estimator in ESTIMATORS:
        layer.estimator = estimator
        assert layer(x, output_size=[8, 7]).shape == (2, 4, 8, 7)
        assert layer(x, (2, 4, 7, 8)).shape == (2, 4, 7, 8)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=[9, 9])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch(estimator: Estimator) -> None:
    layer = fb.BayesConv2d(3, 4, 3, estimator=estimator)
    assert layer(torch.empty(0, 3, 5, 5)).shape == (0, 4, 3, 3)


def test_channels_last() -> None:
    """Parameters and input in torch's other memory format: the same function."""
    layer, x = fb.BayesConv2d(3, 4, 3), torch.randn(2, 3, 6, 5)
    expected = frozen(layer, x)
    layer.to(memory_format=torch.channels_last)
    actual = frozen(layer, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    actual.sum().backward()
    assert layer.weight_rho.grad.shape == layer.weight_rho.shape

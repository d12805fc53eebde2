"""``layer.weight`` of a Bayesian layer: what it is, without values."""

import copy

import pytest
import torch

import fusedbayes as fb
from fusedbayes.nn import RandomTensor


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_random_tensor_tells_what_it_is_but_no_values(name: str) -> None:
    """Models ask for a weight's dtype or device; whoever would compute with it is told what it is."""
    layer = fb.BayesLinear(5, 3, dtype=torch.float64)
    tensor, mu = getattr(layer, name), getattr(layer, f"{name}_mu")
    assert isinstance(tensor, RandomTensor)
    assert (tensor.dtype, tensor.device, tensor.shape, tensor.requires_grad) == (mu.dtype, mu.device, mu.shape, True)
    assert (tensor.size(0), tensor.dim(), tensor.numel(), tensor.is_floating_point()) == (3, mu.dim(), mu.numel(), True)
    hint = f"the random '{name}' of a BayesLinear.* its mean is layer.{name}_mu"
    for compute in (
        lambda: torch.relu(tensor),
        lambda: mu + tensor,
        lambda: tensor @ mu.t(),
        lambda: torch.stack([mu, tensor]),
    ):
        with pytest.raises(TypeError, match=hint):
            compute()
    for attribute in ("data", "grad", "t", "item"):
        with pytest.raises(AttributeError, match=f"has no '{attribute}'.*{name}_mu"):
            getattr(tensor, attribute)
    assert copy.copy(tensor).dtype == torch.float64
    assert fb.BayesLinear(5, 3, bias=False).bias is None
    with pytest.raises(AttributeError, match="has no attribute 'weights'"):
        _ = layer.weights


def test_a_random_tensor_is_not_assigned() -> None:
    """Tying layers that are Bayesian already, as one ties those of torch, would tie nothing."""
    first, second = fb.BayesLinear(5, 3), fb.BayesLinear(5, 3)
    before = list(second.state_dict())
    for value in (first.weight, torch.nn.Parameter(torch.ones(3, 5))):
        with pytest.raises(AttributeError, match=r"'weight' of BayesLinear is random: assign weight_mu and weight_rho"):
            second.weight = value
    assert list(second.state_dict()) == before


def test_a_random_tensor_within_torch_compile() -> None:
    layer = fb.BayesLinear(5, 3, dtype=torch.float64)

    def cast(x: torch.Tensor) -> torch.Tensor:
        return layer(x.to(layer.weight.dtype)) if layer.bias is not None else x

    torch._dynamo.reset()
    assert torch.compile(cast, fullgraph=True, backend="eager")(torch.ones(2, 5)).dtype == torch.float64

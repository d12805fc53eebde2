"""What a layer does with a prior, whatever it is: objective, state, conversion, compilation."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from priors import F64, PRIORS, every_prior
from torch import Tensor, nn

from fusedbayes import (
    ELBO,
    BayesLinear,
    frozen_sample,
    functional,
    kl_loss,
    kl_report,
    mean_mode,
    predict,
    to_bayesian,
    to_deterministic,
)
from fusedbayes.priors import Laplace, LearnedNormal, Normal, Prior


def model(name: str, **options: Any) -> nn.Sequential:
    prior = PRIORS[name]()
    return nn.Sequential(
        BayesLinear(5, 7, prior=prior, **options), nn.Tanh(), BayesLinear(7, 3, bias=False, prior=prior, **options)
    )


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(11, 5, dtype=dtype), torch.randint(0, 3, (11,))


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call draws the same seed."""
    for module in ("arguments", "nn.drawing"):
        monkeypatch.setattr(f"fusedbayes.{module}.draw_seed", lambda device=None: torch.tensor(11, device=device))


@pytest.mark.usefixtures("same_noise")
@every_prior
def test_the_objective_charges_each_tensor_with_its_own_prior(name: str) -> None:
    net, prior = model(name, dtype=F64), PRIORS[name]().double()
    tensors = [(net[0].weight_mu, net[0].weight_rho), (net[0].bias_mu, net[0].bias_rho)]
    tensors.append((net[2].weight_mu, net[2].weight_rho))
    expected = sum(prior.weight_kl(*tensor, seed=11) for tensor in tensors)
    # The fused sums and these add up 63 terms in another order; the test's own prior is held in float32.
    close = {"rtol": 1e-6 if name == "student-t" else 1e-12, "atol": 0.0}
    torch.testing.assert_close(kl_loss(net), expected, **close)
    out = ELBO(net, F.cross_entropy, 10)(*data(F64))
    torch.testing.assert_close(out.kl, expected, **close)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    torch.testing.assert_close(sum(row.kl for row in kl_report(net)), expected.item(), **close)


@every_prior
def test_a_forward_does_not_know_its_prior(name: str) -> None:
    net = model(name)
    other = model("normal")
    other.load_state_dict({k: v for k, v in net.state_dict().items() if "prior" not in k}, strict=False)
    x, _ = data()
    for context in (lambda m: frozen_sample(m, 3), mean_mode):
        outputs = []
        for each in (net, other):
            with context(each):
                outputs.append(each(x))
        assert torch.equal(*outputs)
    assert torch.equal(predict(net, x, 4, seed=1).outputs, predict(other, x, 4, seed=1).outputs)


@every_prior
def test_each_tensor_has_a_copy_that_is_saved_and_loaded(name: str) -> None:
    given = PRIORS[name]()
    net = nn.Sequential(BayesLinear(5, 7, prior=given), BayesLinear(7, 3, prior=given))
    held = [layer.prior_of(tensor) for layer in net for tensor in ("weight", "bias")]
    tensors = [t.data_ptr() for prior in (given, *held) for t in (*prior.parameters(), *prior.buffers())]
    assert len(set(tensors)) == len(tensors)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.rand(parameter.shape))
    other = nn.Sequential(BayesLinear(5, 7, prior=given), BayesLinear(7, 3, prior=given))
    other.load_state_dict(net.state_dict())
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for each in (other, copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert each.state_dict().keys() == net.state_dict().keys()
        for key, value in net.state_dict().items():
            assert torch.equal(each.state_dict()[key], value)
        torch.manual_seed(1)
        expected = kl_loss(net)
        torch.manual_seed(1)
        assert torch.equal(kl_loss(each), expected)


@every_prior
def test_meta_and_reset(name: str) -> None:
    layer = BayesLinear(5, 7, prior=PRIORS[name](), device="meta")
    repr(layer)
    layer.to_empty(device="cpu").reset_parameters()
    made = BayesLinear(5, 7, prior=PRIORS[name]())
    assert repr(layer) == repr(made)
    parameters = list(layer.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    layer.set_prior(Laplace(0.0, 2.0)) if name == "normal" else None
    layer.reset_parameters()
    for key, value in made.state_dict().items():
        if "prior" in key or "rho" in key:
            assert torch.equal(layer.state_dict()[key], value)
    # In place: an optimizer has them.
    assert all(now is then for now, then in zip(layer.parameters(), parameters, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
@every_prior
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    for net in (model(name, dtype=dtype), model(name).to(dtype)):
        kl = kl_loss(net)
        assert kl.dtype == torch.promote_types(dtype, torch.float32)
        kl.backward()
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in net.parameters())
        assert kl.isfinite()


@every_prior
def test_conversion_there_and_back(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[1].weight = net[0].weight
    before, children = dict(net[0].named_parameters()), [dict(module._modules) for module in net]
    _, report = to_bayesian(net, prior=PRIORS[name](), return_report=True)
    assert [row.outcome for row in report] == ["BayesLinear"] * 3
    assert to_bayesian(nn.Sequential(net, nn.Linear(2, 2)), return_report=True)[1][0].module == "Linear"
    tied = [net[i].prior_of("weight") for i in (0, 1)]
    assert [t.data_ptr() for t in tied[0].buffers()] == [t.data_ptr() for t in tied[1].buffers()]
    learned = len(list(PRIORS[name]().parameters()))
    # Of weight, bias and sigma twice, less what is tied.
    assert len(list(net.parameters())) == 10 + 5 * learned
    assert len(kl_report(net)) == 5
    to_deterministic(net)
    assert [dict(module._modules) for module in net] == children
    assert dict(net[0].named_parameters()) == before
    assert net[1].weight is net[0].weight
    to_bayesian(net)
    assert "prior_sigma=0.5" in repr(net[0])


def test_what_a_prior_is_made_of_is_not_converted() -> None:
    class Energy(Prior):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def log_prob(self, w: Tensor) -> Tensor:
            return -self.net(w[..., None])[..., 0].square()

    net = nn.Sequential(to_bayesian(nn.Linear(3, 2), prior=Energy()), nn.Linear(2, 2))
    _, report = to_bayesian(net, return_report=True)
    assert [(row.name, row.outcome) for row in report] == [("1", "BayesLinear")]
    assert type(net[0].weight_prior.net) is nn.Linear
    to_deterministic(net)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("name", ["laplace", "learned", "mixture", "student-t"])
def test_compiled(name: str) -> None:
    net, (x, y) = model(name), data()
    elbo, results = ELBO(net, F.cross_entropy, 10), []
    for run in (elbo, torch.compile(elbo, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        out = run(x, y)
        results.append([out._asdict(), torch.autograd.grad(out.loss, list(net.parameters()))])
    torch.testing.assert_close(*results)


def test_other_parameters_by_a_functional_call() -> None:
    layer = BayesLinear(3, 2, prior=LearnedNormal(0.0, 0.3), dtype=F64)
    others = {key: torch.randn_like(value) for key, value in layer.named_parameters()}

    class Kl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self) -> Tensor:
            return kl_loss(self.layer)

    kl = torch.func.functional_call(Kl(), {f"layer.{key}": value for key, value in others.items()}, ())
    layer.load_state_dict(layer.state_dict() | others)
    torch.testing.assert_close(kl, kl_loss(layer))


def test_a_layer_takes_a_subclass_of_normal_as_it_is() -> None:
    class Shifted(Normal):
        def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
            return super().kl(mu, sigma) + 1.0

    layer = BayesLinear(3, 2, bias=False, prior=Shifted(0.0, 0.5))
    plain = functional.weight_kl(layer.weight_mu, layer.weight_rho, (0.0, 0.5))
    torch.testing.assert_close(layer.kl_loss(), plain + 6.0)


def test_set_prior_of_any_kind_and_back() -> None:
    layer = BayesLinear(5, 3)
    names = set(layer.state_dict())
    given = Laplace(0.0, 0.5)
    layer.set_prior(given, name="bias")
    assert set(layer.state_dict()) == names - {"bias_prior_mu", "bias_prior_sigma"} | {
        "bias_prior.mu",
        "bias_prior.scale",
    }
    assert isinstance(layer.prior_of("weight"), Normal)
    with pytest.raises(ValueError, match="prior of 'bias' is a Laplace"):
        layer.prior("bias")
    # Both in one layer: neither is fused, both are charged.
    out = ELBO(layer, F.cross_entropy, 10)(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(out.kl, layer.kl_of("weight") + given.weight_kl(layer.bias_mu, layer.bias_rho))
    layer.set_prior(Normal(0.25, torch.ones(3)), name="bias")
    assert set(layer.state_dict()) == names
    assert torch.equal(layer.bias_prior_sigma, torch.ones(3))


def test_set_prior_takes_what_is_no_tensor_too() -> None:
    class Power(Prior):
        def __init__(self, exponent: float) -> None:
            super().__init__()
            self.exponent = exponent
            self.log_scale = nn.Parameter(torch.zeros(()))

        def log_prob(self, w: Tensor) -> Tensor:
            return -((w.abs() / self.log_scale.exp()) ** self.exponent) - self.log_scale

    layer = BayesLinear(3, 2, prior=Power(3.0))
    parameters = list(layer.parameters())
    layer.set_prior(Power(1.5))
    assert [layer.prior_of(name).exponent for name in ("weight", "bias")] == [1.5, 3.0]
    layer.reset_parameters()
    assert layer.prior_of("weight").exponent == 3.0
    # In place: an optimizer has them.
    assert all(now is then for now, then in zip(layer.parameters(), parameters, strict=True))


def test_a_prior_is_not_tied_to_the_mean() -> None:
    layer = BayesLinear(5, 3)
    for prior in (Laplace(layer.weight_mu, 0.1), Normal(layer.weight_mu, 0.1)):
        layer.set_prior(prior)
        before = prior.mu.clone()
        with torch.no_grad():
            layer.weight_mu.add_(1.0)
        held = layer.prior_of("weight")
        assert torch.equal(held.mu, before)
        assert not held.mu.requires_grad
        assert torch.equal(prior.mu, before)

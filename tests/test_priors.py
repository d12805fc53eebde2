"""Priors: their KL, what a layer does with any of them, and how a user writes one."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, StudentT, kl_divergence
from torch.distributions import Laplace as TorchLaplace
from torch.distributions import Normal as TorchNormal
from torch.utils._python_dispatch import TorchDispatchMode

from fusedbayes import (
    ELBO,
    BayesLinear,
    frozen_sample,
    functional,
    kl_loss,
    kl_report,
    mean_mode,
    predict,
    reference,
    to_bayesian,
    to_deterministic,
)
from fusedbayes.noise import Address
from fusedbayes.priors import Laplace, LearnedNormal, Normal, Prior, ScaleMixture

F64 = torch.float64


class LearnedStudentT(Prior):
    """As a user writes one: a density, and a scale that is learnt."""

    def __init__(self, df: float, scale: float) -> None:
        super().__init__()
        self.register_buffer("df", torch.tensor(df))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def log_prob(self, w: Tensor) -> Tensor:
        z = w / self.log_scale.exp()
        constant = torch.lgamma((self.df + 1) / 2) - torch.lgamma(self.df / 2) - 0.5 * torch.log(self.df * math.pi)
        return constant - self.log_scale - (self.df + 1) / 2 * torch.log1p(z.square() / self.df)


class Horseshoe(Prior):
    """The lower bound log(1 + 4 tau^2 / w^2) of the horseshoe's density, up to a constant; smooth at 0."""

    def log_prob(self, w: Tensor) -> Tensor:
        return torch.log(torch.log1p(0.04 / (w.square() + 1e-6)))


class Flat(Prior):
    """Improper: the KL is the negative entropy. A user's closed form."""

    def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
        return -sigma.log() + 0.0 * mu


PRIORS: dict[str, Callable[[], Prior]] = {
    "normal": lambda: Normal(0.1, 0.3),
    "learned": lambda: LearnedNormal(0.1, 0.3),
    "laplace": lambda: Laplace(0.1, 0.2),
    "mixture": lambda: ScaleMixture(0.25, 0.8, 0.02),
    "student-t": lambda: LearnedStudentT(3.0, 0.2),
    "horseshoe": Horseshoe,
    "flat": Flat,
}
ESTIMATED = {"mixture", "student-t", "horseshoe"}
every_prior = pytest.mark.parametrize("name", PRIORS)


def parameter(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """mu and rho of sigmas from 0.02 to 0.6."""
    mu, rho = torch.randn(shape, dtype=dtype) * 0.3, torch.randn(shape, dtype=dtype) - 2.0
    return mu.requires_grad_(), rho.requires_grad_()


def expectation(function: Callable[[Tensor], Tensor], mu: Tensor, sigma: Tensor) -> Tensor:
    """E f(w) of w ~ N(mu, sigma^2) by the trapezoidal rule: right to 1e-9 for a smooth f, to 1e-6 with a kink."""
    eps = torch.linspace(-9.0, 9.0, 20001, dtype=F64)
    density = torch.exp(-0.5 * eps.square()) / math.sqrt(2.0 * math.pi) * (eps[1] - eps[0])
    return (function(mu[..., None] + sigma[..., None] * eps) * density).sum(-1)


def exact_kl(prior: Prior, mu: Tensor, rho: Tensor) -> Tensor:
    """By the definition, E log q(w) - log p(w)."""
    sigma = reference.sigma_from_rho(rho)
    entropy = sigma.log() + 0.5 * math.log(2.0 * math.pi * math.e)
    return -entropy - expectation(prior.log_prob, mu, sigma)


# --- each prior


def double(number: float) -> Tensor:
    return torch.tensor(number, dtype=F64)


DENSITIES = {
    "normal": TorchNormal(double(0.1), double(0.3)),
    "learned": TorchNormal(double(0.1), double(0.3)),
    "laplace": TorchLaplace(double(0.1), double(0.2)),
    "mixture": MixtureSameFamily(
        Categorical(torch.tensor([0.25, 0.75], dtype=F64)),
        TorchNormal(torch.zeros(2, dtype=F64), torch.tensor([0.8, 0.02], dtype=F64)),
    ),
    "student-t": StudentT(double(3.0), 0.0, 0.2),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_are_those_of_torch(name: str) -> None:
    w = torch.linspace(-2.0, 2.0, 41, dtype=F64)
    prior = PRIORS[name]().double()
    # The test's own prior was made in float32.
    tolerance = 1e-6 if name == "student-t" else 1e-13
    torch.testing.assert_close(prior.log_prob(w), DENSITIES[name].log_prob(w), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["normal", "learned", "laplace"])
def test_closed_forms_are_those_of_torch_and_of_the_definition(name: str) -> None:
    (mu, rho), prior = parameter(3, 5), PRIORS[name]()
    sigma = F.softplus(rho)
    kl = prior.kl(mu, sigma)
    torch.testing.assert_close(kl, kl_divergence(TorchNormal(mu, sigma), DENSITIES[name]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl, exact_kl(prior, mu, rho), rtol=0, atol=1e-6)
    torch.testing.assert_close(prior.weight_kl(mu, rho), kl.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(ESTIMATED))
def test_the_estimate_is_unbiased_and_so_are_its_gradients(name: str) -> None:
    prior, batches, rows = PRIORS[name]().double(), 64, 256
    mu, rho = (tensor.detach().expand(rows, 6).clone().requires_grad_() for tensor in parameter(6))
    samples = []
    for sample in range(batches):
        kl = prior.weight_kl(mu, rho, seed=5, sample=sample)
        grads = torch.autograd.grad(kl, (mu, rho))
        samples.append(torch.cat([kl[None].detach(), *(grad.sum(0) for grad in grads)]) / rows)
    one = [tensor[0].detach().requires_grad_() for tensor in (mu, rho)]
    exact = exact_kl(prior, *one).sum()
    expected = torch.cat([exact[None].detach(), *torch.autograd.grad(exact, one)])
    mean, error = torch.stack(samples).mean(0), torch.stack(samples).std(0) / math.sqrt(batches)
    # Of 13 means none is off by more than 4.5 standard errors, but once in 10^4 times.
    assert ((mean - expected).abs() <= 4.5 * error).all()


def test_the_fused_mixture_is_the_estimate_of_the_same_noise() -> None:
    prior, (mu, rho) = ScaleMixture(0.25, 0.8, 0.02), parameter(3, 7)
    noise: dict[str, Any] = {"seed": 7, "sample": 3, "address": Address(8, 2, 1)}
    fused = prior.weight_kl(mu, rho, **noise)
    generic = functional.weight_kl_estimate(mu, rho, prior.log_prob, **noise)
    torch.testing.assert_close(fused, generic, rtol=1e-12, atol=0)
    grads = (torch.autograd.grad(kl, (mu, rho)) for kl in (fused, generic))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_laplace_far_away_and_of_the_smallest_sigma() -> None:
    mu = torch.tensor([0.0, 1e-30, 1e-6, 1.0, -1e4, 1e30]).requires_grad_()
    for rho in (-1e4, -200.0, -60.0, -41.0, -20.0):
        rhos = torch.full_like(mu, rho).requires_grad_()
        kl = Laplace(0.0, 0.2).kl(mu, reference.sigma_from_rho(rhos))
        sigma = reference.sigma_from_rho(torch.tensor(rho, dtype=F64))
        far = mu.detach().double().abs() / 0.2  # beyond a few sigma E|w| is |mu|
        expected = math.log(0.2) - sigma.log() + 0.5 * (math.log(2.0 / math.pi) - 1.0) + far
        # Within a few sigma, E|w| / scale may be 5 sigma more; terms of order 100 are rounded four times.
        torch.testing.assert_close(kl.double(), expected, rtol=2.0**-21, atol=400 * 2.0**-24 + 5 * sigma.item())
        grad_mu, grad_rho = torch.autograd.grad(kl.sum(), (mu, rhos))
        assert grad_mu.isfinite().all()
        assert grad_rho.isfinite().all()
        torch.testing.assert_close(grad_mu[3:], 5.0 * mu[3:].detach().sign(), rtol=2.0**-22, atol=0)
        # d KL / d rho is -sigmoid(rho) / sigma there: -1 for a small sigma, 0 below its floor.
        slope = 0.0 if rho < -88 else -torch.sigmoid(torch.tensor(rho, dtype=F64)) / sigma
        torch.testing.assert_close(grad_rho[3:].double(), torch.full((3,), 1.0, dtype=F64) * slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_learned_sigma_is_best_at_the_second_moment(factor: float, dtype: torch.dtype) -> None:
    mu, rho = parameter(30, 5, dtype=dtype)
    best = (F.softplus(rho).square() + (mu - 0.1).square()).mean().sqrt().item()
    prior = LearnedNormal(0.1, factor * best)
    prior.weight_kl(mu, rho).backward()
    # d KL / d log sigma = n (1 - best^2 / sigma^2), by two KLs of some 500, three times, of a few roundings each.
    roundings = 3 * 500 * 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(prior.log_sigma.grad, double(150 * (1.0 - factor**-2.0)), rtol=0, atol=roundings)


def test_sigma_is_a_standard_deviation_and_log_sigma_its_logarithm() -> None:
    w = torch.randn(5, dtype=F64)
    layer = BayesLinear(3, 2, prior=LearnedNormal(0.0, 0.25), dtype=F64)
    learned = layer.prior_of("weight")
    assert isinstance(learned, LearnedNormal)
    torch.testing.assert_close(learned.log_sigma.item(), math.log(0.25))
    expected = TorchNormal(0.0, 0.25).log_prob(w)
    for prior in (Normal(0.0, 0.25), learned, ScaleMixture(0.5, 0.25, 0.25)):
        torch.testing.assert_close(prior.log_prob(w), expected)


def test_the_mixture_is_that_of_blitz() -> None:
    sampler = pytest.importorskip("blitz.modules.weight_sampler")
    theirs = sampler.PriorWeightDistribution(pi=0.25, sigma1=0.8, sigma2=0.02)
    w = torch.linspace(-1.0, 1.0, 41, dtype=F64)
    ours = ScaleMixture(0.25, 0.8, 0.02).log_prob(w)
    # They add 1e-6 to the density, which is 0.05 at least here, and take 1/2 off each logarithm.
    torch.testing.assert_close(theirs.log_prior(w), ours.sum() - 0.5 * 41, rtol=0, atol=41 * 1e-6 / 0.05)


# --- a prior of one's own


def test_which_of_two_methods_counts() -> None:
    class Wider(Laplace):
        def log_prob(self, w: Tensor) -> Tensor:
            return -w.abs()

    class Exact(Horseshoe):
        def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
            return sigma + mu.square()

    class Shifted(Normal):
        def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
            return super().kl(mu, sigma) + 1.0

    class Doubled(ScaleMixture):
        def log_prob(self, w: Tensor) -> Tensor:
            return 2.0 * super().log_prob(w)

    mu, rho = parameter(3, 4)
    kls = {kind: kind().weight_kl(mu, rho, seed=1) for kind in (Wider, Exact, Shifted, Doubled)}
    estimate = functional.weight_kl_estimate
    torch.testing.assert_close(kls[Wider], estimate(mu, rho, lambda w: -w.abs(), seed=1))
    torch.testing.assert_close(kls[Exact], (F.softplus(rho) + mu.square()).sum())
    torch.testing.assert_close(kls[Shifted], Normal().weight_kl(mu, rho) + 12.0)
    torch.testing.assert_close(kls[Doubled], estimate(mu, rho, lambda w: 2 * ScaleMixture().log_prob(w), seed=1))


def test_a_layer_takes_a_subclass_of_normal_as_it_is() -> None:
    class Shifted(Normal):
        def kl(self, mu: Tensor, sigma: Tensor) -> Tensor:
            return super().kl(mu, sigma) + 1.0

    layer = BayesLinear(3, 2, bias=False, prior=Shifted(0.0, 0.5))
    plain = functional.weight_kl(layer.weight_mu, layer.weight_rho, (0.0, 0.5))
    torch.testing.assert_close(layer.kl_loss(), plain + 6.0)


@pytest.mark.parametrize(
    ("method", "returns", "error", "message"),
    [
        ("kl", lambda mu, sigma: mu.sum(), ValueError, r"kl of Mine must return .* shape \(3, 2\), got .* shape \(\)"),
        ("kl", lambda mu, sigma: 0.0, ValueError, r"got 0\.0 \(float\)"),
        ("log_prob", lambda w: w.mean(), ValueError, r"log_prob must return .* shape of w, \(3, 2\), got .*shape \(\)"),
        ("other", None, NotImplementedError, r"Mine must override kl\(mu, sigma\) or log_prob\(w\)"),
    ],
)
def test_errors_of_a_users_prior(method: str, returns: Any, error: type[Exception], message: str) -> None:
    kind = type("Mine", (Prior,), {method: (lambda self, *tensors: returns(*tensors))})
    with pytest.raises(error, match=message):
        kind().weight_kl(*parameter(3, 2))


@pytest.mark.parametrize("name", ["laplace", "learned", "student-t", "mixture"])
def test_derivatives_of_any_order(name: str) -> None:
    prior = PRIORS[name]().double()
    mu, rho = parameter(2, 3)
    learned = list(prior.parameters())

    def run(mu: Tensor, rho: Tensor, *_: Tensor) -> Tensor:
        return prior.weight_kl(mu, rho, seed=3)

    assert torch.autograd.gradcheck(run, (mu, rho, *learned))
    assert torch.autograd.gradgradcheck(run, (mu, rho, *learned))
    # torch.func goes its own way.
    ours = torch.autograd.grad(run(mu, rho), (mu, rho))
    torch.testing.assert_close(torch.func.grad(run, (0, 1))(mu, rho), ours)


class Allocated(TorchDispatchMode):
    """The tensors of at least so many elements that were made, while they live."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.made: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numel:
                self.made.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
        return result

    def alive(self) -> int:
        return len({made.cdata for made in self.made if not made.expired()})


@every_prior
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(name: str) -> None:
    prior, (mu, rho) = PRIORS[name](), parameter(30, 5, dtype=torch.float32)
    with Allocated(mu.numel()) as allocated:
        kl = prior.weight_kl(mu * 1.0, rho)
    # But for the product, which is an argument.
    assert allocated.alive() <= 1
    kl.backward()
    assert mu.grad is not None


# --- layers


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
    for module in ("arguments", "nn.module"):
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


@pytest.mark.parametrize("name", ["laplace", "learned", "mixture", "student-t"])
def test_compiled(name: str) -> None:
    net = model(name)
    elbo = ELBO(net, F.cross_entropy, 10)
    out = torch.compile(elbo, backend="aot_eager", fullgraph=True)(*data())
    out.loss.backward()
    assert out.kl.isfinite()
    assert all(parameter.grad is not None for parameter in net.parameters())


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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Normal(0.0, 0.0), ValueError, r"sigma must be finite and positive, got 0\.0"),
        (lambda: Normal("0", 1.0), TypeError, "mu must be a number, got '0'"),
        (lambda: Normal(0.0, torch.zeros(3)), ValueError, "sigma must be finite and positive, got tensor"),
        (lambda: Laplace(torch.zeros(3, dtype=torch.long)), TypeError, "mu must be a number or .*int64"),
        (lambda: Laplace(0.0, -1.0), ValueError, r"scale must be finite and positive, got -1\.0"),
        (lambda: LearnedNormal(0.0, math.inf), ValueError, "sigma must be finite and positive, got inf"),
        (lambda: ScaleMixture(1.0), ValueError, r"pi must lie between 0 and 1 in float32, got 1\.0"),
        (lambda: ScaleMixture(1.0 - 1e-12), ValueError, "pi must lie between 0 and 1 in float32, got 0.99"),
        (lambda: ScaleMixture(0.5, 1e-20), ValueError, r"sigma_1 must lie in \[1e-15, 1e\+15\], got 1e-20"),
        (lambda: ScaleMixture(0.5, 1.0, True), TypeError, "sigma_2 must be a number, got True"),
        (lambda: BayesLinear(3, 2, prior=0.5), TypeError, r"prior must be a fusedbayes.priors.Prior, got 0\.5"),
        (
            lambda: BayesLinear(3, 2, prior=Laplace(), prior_sigma=1.0),
            ValueError,
            "either prior or prior_mu and prior_",
        ),
        (lambda: BayesLinear(3, 2, prior=Normal(), prior_mu=1.0), ValueError, "either prior or prior_mu and prior_sig"),
        (
            lambda: BayesLinear(3, 2, prior=Laplace(0.0, torch.ones(2, 3))),
            ValueError,
            r"scale must have shape .*\(2,\)",
        ),
        (lambda: BayesLinear(3, 2, prior=Normal(torch.ones(2, 3))), ValueError, r"prior_mu must have shape .*\(2,\)"),
        (lambda: BayesLinear(3, 2).set_prior(Laplace(), 1.0), ValueError, r"without sigma, got sigma=1\.0"),
        (
            lambda: BayesLinear(3, 2).set_prior(Laplace(torch.ones(3))),
            ValueError,
            r"mu must have shape \(\) or \(2, 3\)",
        ),
        (lambda: to_bayesian(nn.Linear(3, 2), prior=Laplace(), init="moped"), ValueError, "leave prior_mu, prior and"),
        (lambda: to_bayesian(nn.Linear(3, 2), prior=Laplace(), prior_mu=1.0), ValueError, "either prior or prior_mu"),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pi": 0.0}, ValueError, r"pi must lie between 0 and 1 in float32, got 0\.0"),
        ({"sigma_2": 0.0}, ValueError, r"sigma_2 must be finite and positive, got 0\.0"),
        ({"sigma_1": torch.ones(2)}, ValueError, r"sigma_1 must .* broadcast|sigma_1 must be a number or a 0-d tensor"),
        ({"sigma_1": torch.ones((), requires_grad=True)}, ValueError, "that requires grad: .* weight_kl_estimate"),
        ({"pi": torch.ones((), dtype=torch.long)}, TypeError, "pi must be a floating-point tensor"),
        ({"seed": 1.5}, TypeError, "seed must be"),
        ({"address": 3}, TypeError, "address must be"),
        ({"rho": torch.zeros(3)}, ValueError, "rho must have the shape of mu"),
    ],
)
def test_errors_of_scale_mixture_kl(options: dict[str, Any], error: type[Exception], message: str) -> None:
    mu = torch.zeros(3, 2)
    arguments = {"mu": mu, "rho": mu, "pi": 0.5, "sigma_1": 1.0, "sigma_2": 0.1} | options
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        functional.scale_mixture_kl(**arguments)
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_of_weight_kl_estimate() -> None:
    mu = torch.zeros(3, 2)
    with pytest.raises(TypeError, match="log_prob must be callable"):
        functional.weight_kl_estimate(mu, mu, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rho must have the dtype of mu"):
        functional.weight_kl_estimate(mu, mu.double(), lambda w: w)

"""Priors by themselves: their densities, KL and gradients, and how a user writes one."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from priors import ESTIMATED, F64, PRIORS, Horseshoe, every_prior, parameter
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, StudentT, kl_divergence
from torch.distributions import Laplace as TorchLaplace
from torch.distributions import Normal as TorchNormal
from torch.utils._python_dispatch import TorchDispatchMode

from fusedbayes import (
    BayesLinear,
    functional,
    reference,
    to_bayesian,
)
from fusedbayes.noise import Address
from fusedbayes.priors import Laplace, LearnedNormal, Normal, Prior, ScaleMixture


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

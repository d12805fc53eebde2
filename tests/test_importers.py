"""Checkpoints of other libraries: the same means, sigma, prior and KL in our layers, and what their KL is in ours."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import foreign
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import fusedbayes as fb
from fusedbayes import reference
from fusedbayes.nn import variational_parameters

PRIORS = ((0.25, 0.5), (-0.1, 0.3))  # of a model's two layers; where a prior has no mean, its mean is 0


class Case(NamedTuple):
    """A layer of another library, ours, and an input."""

    library: str
    kind: str
    ours: type[nn.Module]
    shape: tuple[int, ...]
    sizes: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.library}-{self.kind}"

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Two networks of one architecture: theirs and ours, with different priors in its layers."""
        biases: list[dict[str, bool]] = [{}, {}] if "Embedding" in self.kind else [{}, {"bias": False}]
        theirs = [
            foreign.layer(self.library, self.kind, *self.sizes, prior=prior, **dict(self.options), **bias)
            for prior, bias in zip(PRIORS, biases, strict=True)
        ]
        ours = [self.ours(*self.sizes, **dict(self.options), **bias) for bias in biases]
        return nn.Sequential(*theirs, nn.PReLU()), nn.Sequential(*ours, nn.PReLU())


LINEAR: Any = ("Linear", fb.BayesLinear, (3, 4), (4, 4))
CONVOLUTIONS: Any = [
    (f"Conv{d}d", getattr(fb, f"BayesConv{d}d"), (2, 4, *(5,) * d), (4, 4, 3 if d == 1 else (3,) * d),
     (("padding", 1), ("groups", 2))) for d in (1, 2, 3)
]  # fmt: skip
TRANSPOSED: Any = [
    (f"ConvTranspose{d}d", getattr(fb, f"BayesConvTranspose{d}d"), (2, 4, *(5,) * d),
     (4, 4, 3 if d == 1 else (3,) * d), (("stride", 2),)) for d in (1, 2, 3)
]  # fmt: skip
CASES = [
    *(
        Case("bayesian-torch", f"{kind}Reparameterization", *rest)
        for kind, *rest in [LINEAR, *CONVOLUTIONS, *TRANSPOSED]
    ),
    # Its ConvTranspose3dFlipout cannot be called without the KL.
    *(Case("bayesian-torch", f"{kind}Flipout", *rest) for kind, *rest in [LINEAR, *CONVOLUTIONS, *TRANSPOSED[:2]]),
    *(Case("torchbnn", f"Bayes{kind}", *rest) for kind, *rest in [LINEAR, CONVOLUTIONS[1]]),
    *(Case("blitz", f"Bayesian{kind}", *rest) for kind, *rest in [LINEAR, *CONVOLUTIONS]),
    *(Case("torch-uncertainty", f"Bayes{kind}", *rest) for kind, *rest in [LINEAR, *CONVOLUTIONS]),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
LINEAR_CASES = [case for case in CASES if case.ours is fb.BayesLinear and "Flipout" not in case.kind]
libraries = pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.library)


def posteriors_and_priors(
    model: Iterable[nn.Module], library: str, priors: Iterable[tuple[float, float]] = PRIORS
) -> Iterator[tuple[Normal, Normal]]:
    """Of each random tensor of another library's layers, by torch.distributions, in float64."""
    for layer, (prior_mu, prior_sigma) in zip(model, priors, strict=False):
        prior_mu = prior_mu if library in ("bayesian-torch", "torchbnn") else 0.0
        for mu, scale in (pair for part in layer.modules() for pair in foreign.tensors(part)):
            scale = scale.detach().double()
            sigma = scale.exp() if library == "torchbnn" else torch.log1p(torch.exp(scale))
            prior = Normal(*torch.tensor([prior_mu, prior_sigma], dtype=torch.float64))
            yield Normal(mu.detach().double(), sigma), prior


def true_kl(model: Iterable[nn.Module], library: str, priors: Iterable[tuple[float, float]] = PRIORS) -> Tensor:
    return sum(kl_divergence(q, p).sum() for q, p in posteriors_and_priors(model, library, priors))


@cases
def test_means_give_the_same_output(case: Case) -> None:
    theirs, ours = case.pair()
    fb.load_foreign(ours, theirs, case.library)
    x = torch.randn(case.shape)
    with fb.mean_mode(ours):
        # The same products of float32 numbers by the same functions of torch.
        torch.testing.assert_close(ours(x), foreign.without_noise(theirs)(x), rtol=1e-6, atol=1e-6)


@cases
def test_posterior_and_kl_are_the_same(case: Case) -> None:
    theirs, ours = case.pair()
    report = fb.load_foreign(ours, theirs, case.library)
    parameters = list(variational_parameters(ours))
    assert [row.name for row in report] == [f"{p.layer_name}.{p.name}" for p in parameters]
    for parameter, (q, _) in zip(parameters, posteriors_and_priors(theirs, case.library), strict=True):
        torch.testing.assert_close(parameter.value.mu.double(), q.mean, rtol=0, atol=0)
        # One rounding of rho, 6e-8 |rho|, moves log(sigma) by as much; |rho| is below 8.
        sigma = reference.sigma_from_rho(parameter.value.rho).double()
        torch.testing.assert_close(sigma, q.stddev, rtol=1e-6, atol=0)
    # A hundred terms or more of one sign, each right to the same.
    torch.testing.assert_close(fb.kl_loss(ours).double(), true_kl(theirs, case.library), rtol=1e-6, atol=0)


@libraries
def test_a_checkpoint_needs_its_prior_named(case: Case) -> None:
    theirs, ours = case.pair()
    state = theirs.state_dict()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    if case.library == "torch-uncertainty":  # has it in the checkpoint
        fb.load_foreign(ours, state, case.library)
        torch.testing.assert_close(fb.kl_loss(ours).double(), true_kl(theirs, case.library), rtol=1e-6, atol=0)
    else:
        if case.library == "blitz":
            state = {name: value for name, value in state.items() if not name.startswith("1.bias")}
        with pytest.raises(ValueError, match=r"does not hold the prior of '0\.weight': pass prior, such as"):
            fb.load_foreign(ours, state, case.library)
        torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    fb.load_foreign(ours, state, case.library, prior="keep")
    fb.load_foreign(ours, state, case.library, prior=fb.priors.Normal(0.5, 2.0))
    for parameter in variational_parameters(ours):
        assert parameter.layer.prior(parameter.name) == (0.5, 2.0)


def test_keeps_the_priors_of_the_model() -> None:
    theirs, ours = LINEAR_CASES[1].pair()
    ours[0].set_prior(3.0, 4.0)
    report = fb.load_foreign(ours, theirs, "torchbnn", prior="keep")
    assert ours[0].prior("weight") == (3.0, 4.0)
    assert report[0].prior == "Normal(mu=3, sigma=4)"


@libraries
def test_everything_that_does_not_fit_is_named_before_anything_changes(case: Case) -> None:
    theirs, ours = case.pair()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    state = theirs.state_dict()
    mu, scale = foreign.names(theirs[0])
    state["new.name"] = torch.zeros(3)
    state[f"0.{mu}"] = torch.zeros(4, 5)
    del state["2.weight"], state[f"1.{scale}"]
    state.pop("1.weight_rho", None)  # BLiTZ's second name of it
    with pytest.raises(ValueError, match="does not fit") as error:
        fb.load_foreign(ours, state, case.library, prior=fb.priors.Normal())
    message = str(error.value)
    assert f"missing: '1.{scale}', '2.weight'" in message
    assert "'new.name'" in message
    assert f"shape: '0.{mu}' must be (4, 4), got a tensor of dtype torch.float32 and shape (4, 5)" in message
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


def test_errors_name_the_library_that_it_looks_like() -> None:
    theirs, ours = LINEAR_CASES[1].pair()
    with pytest.raises(ValueError, match="look like those of torchbnn"):
        fb.load_foreign(ours, theirs, "bayesian-torch")


@pytest.mark.parametrize(
    "change", [Tensor.to_sparse, lambda t: t.to(torch.cfloat), lambda t: t.to("meta"), Tensor.numpy]
)
def test_values_that_cannot_be_copied_are_named_before_anything_changes(change: Any) -> None:
    ours = nn.Sequential(fb.BayesLinear(4, 3, bias=False), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    state = {"0.weight_mu": torch.randn(3, 4), "0.weight_log_sigma": torch.zeros(3, 4), "1.bias": torch.zeros(2)}
    state["1.weight"] = change(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"'1\.weight' must be"):
        fb.load_foreign(ours, state, "torchbnn", prior=fb.priors.Normal())
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


def test_errors() -> None:
    theirs, ours = LINEAR_CASES[1].pair()
    with pytest.raises(ValueError, match=r"library must be one of 'bayesian-torch', .*, got 'pyro'"):
        fb.load_foreign(ours, theirs, "pyro")
    with pytest.raises(TypeError, match=r"source must be a state_dict or a module, got 'model\.pt'"):
        fb.load_foreign(ours, "model.pt", "torchbnn")
    with pytest.raises(ValueError, match="model has no Bayesian layer"):
        fb.load_foreign(nn.Linear(2, 2), theirs, "torchbnn")
    with pytest.raises(ValueError, match="model is on the meta device"):
        fb.load_foreign(fb.BayesLinear(2, 2, device="meta"), theirs, "torchbnn")
    for prior in (0.5, (0.0, 1.0), "keeps"):
        with pytest.raises(TypeError, match=r"prior must be a fusedbayes\.priors\.Prior, 'keep' or None, got"):
            fb.load_foreign(ours, theirs, "torchbnn", prior=prior)
    before = {name: value.clone() for name, value in ours.half().state_dict().items()}
    with pytest.raises(ValueError, match=r"is no prior of '0\.weight' in torch\.float16"):
        fb.load_foreign(ours, theirs, "torchbnn", prior=fb.priors.Normal(0.0, 1e-9))
    with pytest.raises(ValueError, match=r"prior's mu must have shape \(\) or \(4, 4\)"):
        fb.load_foreign(ours, theirs, "torchbnn", prior=fb.priors.Normal(torch.zeros(3)))
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


def test_blitz_samples_from_parameters_that_part_from_those_of_the_layer() -> None:
    theirs, ours = next(case for case in LINEAR_CASES if case.library == "blitz").pair()
    theirs.double()  # as moving to another device does
    with torch.no_grad():
        theirs[0].weight_sampler.mu.fill_(0.5)  # as training does
    assert not (theirs[0].weight_mu == 0.5).any()
    fb.load_foreign(ours, theirs, "blitz")
    assert (ours[0].weight_mu == 0.5).all()


def test_blitz_keeps_a_bias_that_it_does_not_use() -> None:
    theirs, ours = next(case for case in LINEAR_CASES if case.library == "blitz").pair()
    with pytest.raises(ValueError, match=r"unexpected: '1.bias_mu'(.|\n)*even with bias=False"):
        fb.load_foreign(ours, theirs.state_dict(), "blitz", prior=fb.priors.Normal())
    with pytest.raises(ValueError, match=r"missing: '1.bias_sampler.mu', '1.bias_sampler.rho'"):
        fb.load_foreign(nn.Sequential(fb.BayesLinear(4, 4), fb.BayesLinear(4, 4), nn.PReLU()), theirs, "blitz")


def test_tied_weights_must_be_equal() -> None:
    theirs, ours = LINEAR_CASES[1].pair()
    ours[1].weight_mu, ours[1].weight_rho = ours[0].weight_mu, ours[0].weight_rho
    with pytest.raises(ValueError, match=r"tied: '0.weight_mu' and '1.weight_mu' are one tensor in model"):
        fb.load_foreign(ours, theirs, "torchbnn")
    theirs[1].weight_mu, theirs[1].weight_log_sigma = theirs[0].weight_mu, theirs[0].weight_log_sigma
    fb.load_foreign(ours, theirs, "torchbnn")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@libraries
def test_dtype_of_the_model_stays(case: Case, dtype: torch.dtype) -> None:
    theirs, ours = case.pair()
    fb.load_foreign(ours.to(dtype), theirs, case.library)
    assert all(p.dtype == dtype for p in ours.parameters())
    # In bfloat16 rho is rounded by 2^-9 |rho|; from float64 numbers nothing is lost.
    rtol = 2**-9 * 8 if dtype == torch.bfloat16 else 1e-14
    for parameter, (q, _) in zip(
        variational_parameters(ours), posteriors_and_priors(theirs, case.library), strict=True
    ):
        sigma = reference.sigma_from_rho(parameter.value.rho.double())
        torch.testing.assert_close(sigma, q.stddev, rtol=rtol, atol=0)


@pytest.mark.parametrize("library", ["blitz", "torch-uncertainty"])
def test_scale_mixtures(library: str) -> None:
    kind = {"blitz": "BayesianLinear", "torch-uncertainty": "BayesLinear"}[library]
    theirs = foreign.layer(library, kind, 4, 3, prior=(0.0, 0.5), prior_sigma_2=0.01, prior_pi=0.25)
    ours = fb.BayesLinear(4, 3)
    fb.load_foreign(ours, theirs, library)
    for name in ("weight", "bias"):
        prior = ours.prior_of(name)
        assert isinstance(prior, fb.priors.ScaleMixture)
        assert [round(t.item(), 6) for t in (prior.pi, prior.sigma_1, prior.sigma_2)] == [0.25, 0.5, 0.01]
    theirs = foreign.layer(library, kind, 4, 3, prior=(0.0, 0.5), prior_sigma_2=0.01, prior_pi=0)
    fb.load_foreign(ours, theirs, library)
    torch.testing.assert_close(ours.prior("weight")[1].item(), 0.01)


def test_a_distribution_as_the_prior_of_blitz() -> None:
    ours = fb.BayesLinear(4, 3)
    normal = torch.distributions.Normal(0.5, 2.0)
    fb.load_foreign(ours, foreign.layer("blitz", "BayesianLinear", 4, 3, prior=(0, 1), prior_dist=normal), "blitz")
    assert ours.prior("weight") == (0.5, 2.0)
    laplace = torch.distributions.Laplace(0.5, 2.0)
    with pytest.raises(ValueError, match="the prior of '' is Laplace"):
        fb.load_foreign(ours, foreign.layer("blitz", "BayesianLinear", 4, 3, prior=(0, 1), prior_dist=laplace), "blitz")


def test_checkpoints_of_bayesian_torch_that_hold_the_prior() -> None:
    theirs, ours = LINEAR_CASES[0].pair()
    state = theirs.state_dict()
    for index, names in ((0, ("weight", "bias")), (1, ("weight",))):
        for name in names:
            for part in ("mu", "sigma"):
                state[f"{index}.prior_{name}_{part}"] = getattr(theirs[index], f"prior_{name}_{part}")
    with torch.no_grad():
        state["0.prior_weight_sigma"][0, 0] = 7.0  # one for each weight
    fb.load_foreign(ours, state, "bayesian-torch")
    assert torch.equal(ours[0].prior("weight")[1], state["0.prior_weight_sigma"])
    assert ours[1].prior("weight")[0].dim() == 0


@pytest.mark.parametrize("kind", ["LSTMReparameterization", "LSTMFlipout"])
def test_lstm_of_bayesian_torch(kind: str) -> None:
    theirs = foreign.layer("bayesian-torch", kind, 3, 4, prior=(0.1, 0.5))
    ours = fb.BayesLSTM(3, 4, batch_first=True)
    report = fb.load_foreign(ours, theirs, "bayesian-torch")
    assert report[1].source == "hh.mu_weight, hh.rho_weight"
    kl = true_kl([nn.Sequential(theirs.ih, theirs.hh)], "bayesian-torch", priors=[(0.1, 0.5)])
    torch.testing.assert_close(fb.kl_loss(ours).double(), kl, rtol=1e-6, atol=0)
    x = torch.randn(2, 5, 3)
    with fb.mean_mode(ours):
        # Five steps, each with a rounding in every gate.
        torch.testing.assert_close(ours(x)[0], foreign.without_noise(theirs)(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_of_blitz_are_refused(kind: str) -> None:
    theirs = getattr(foreign.module("blitz.modules"), f"Bayesian{kind}")(3, 4)
    with pytest.raises(ValueError, match=f"no counterpart: '0', a Bayes{kind}: BLiTZ adds one bias"):
        fb.load_foreign(nn.Sequential(getattr(fb, f"Bayes{kind}")(3, 4)), nn.Sequential(theirs), "blitz")


def test_embedding_of_blitz() -> None:
    theirs = foreign.layer("blitz", "BayesianEmbedding", 7, 4, prior=(0.0, 0.5))
    ours = fb.BayesEmbedding(7, 4)
    fb.load_foreign(ours, theirs, "blitz")
    kl = true_kl([theirs], "blitz", priors=[(0.0, 0.5)])
    torch.testing.assert_close(fb.kl_loss(ours).double(), kl, rtol=1e-6, atol=0)
    indices = torch.tensor([1, 2, 6])
    with fb.mean_mode(ours):
        assert torch.equal(ours(indices), foreign.without_noise(theirs)(indices))

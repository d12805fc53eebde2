"""`kl_report` and `gradient_balance`: their numbers, their tables, and that looking changes nothing."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fusedbayes import ELBO, BayesLinear, gradient_balance, kl_loss, kl_report

# Sums of some tens of float32 terms in another order, each rounded to 2^-24 = 6e-8.
FLOAT32 = 2e-6


def bayes(in_features: int, out_features: int, bias: bool = True) -> BayesLinear:
    """Odd numbers of weights, so that their medians are among them, and parameters that differ."""
    layer = BayesLinear(in_features, out_features, bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def test_kl_report_values() -> None:
    model = nn.Sequential(bayes(3, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 5), bayes(5, 7, bias=False)))
    model[0].set_prior(0.5, 2.0, "bias")
    report = kl_report(model)
    assert [row.name for row in report] == ["0.weight", "0.bias", "2.1.weight"]
    for row in report:
        layer, name = row.name.rsplit(".", 1)
        mu, rho, prior_mu, prior_sigma = (t.detach() for t in model.get_submodule(layer).gaussian(name))
        sigma = F.softplus(rho)
        kl = kl_divergence(Normal(mu, sigma), Normal(prior_mu, prior_sigma)).sum().item()
        ordered = sigma.flatten().sort().values
        snr = (mu / sigma).abs().flatten().sort().values
        expected = (kl, kl / mu.numel(), ordered[0], ordered[len(ordered) // 2], ordered[-1], snr[len(snr) // 2])
        assert row.size == mu.numel()
        assert row[2:] == pytest.approx([float(value) for value in expected], rel=FLOAT32)
    assert sum(row.kl for row in report) == pytest.approx(kl_loss(model).item(), rel=FLOAT32)


def test_kl_report_has_tied_parameters_once() -> None:
    model = nn.Sequential(bayes(5, 5), bayes(5, 5))
    model[1].weight_mu, model[1].weight_rho = model[0].weight_mu, model[0].weight_rho
    model.append(model[0])
    assert [row.name for row in kl_report(model)] == ["0.weight", "0.bias", "1.bias"]


def test_kl_report_of_half_precision_is_exact() -> None:
    layer = bayes(9, 7, bias=False).to(torch.bfloat16)
    (row,) = kl_report(layer)
    assert row.name == "weight"
    # The same numbers, which bfloat16 arithmetic would get wrong in the third digit.
    assert row[2:] == pytest.approx(kl_report(layer.float())[0][2:], rel=FLOAT32)


def test_reports_print_as_tables() -> None:
    model = nn.Sequential(bayes(3, 5), bayes(5, 3))
    out = ELBO(model, F.cross_entropy, 10)(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    for report in (kl_report(model), gradient_balance(model, out.nll, out.kl)):
        lines = str(report).splitlines()
        assert lines[0].split() == list(report[0]._fields)
        assert [line.split()[0] for line in lines[1:]] == [row.name for row in report]
        assert [[float(cell) for cell in line.split()[1:]] for line in lines[1:]] == [
            pytest.approx(list(row[1:]), rel=5e-4)
            for row in report  # four digits are printed
        ]
        assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert str(kl_report(nn.Linear(2, 2))) == "(no rows)"


class Balanced(nn.Module):
    """Two Bayesian layers, one of them frozen, a deterministic layer, and a Bayesian one out of reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first = bayes(3, 5)
        self.frozen = bayes(5, 5).requires_grad_(False)
        self.again = self.first
        self.head = nn.Linear(5, 3)
        self.unused = bayes(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.frozen(torch.tanh(self.first(x))))


@pytest.fixture
def balanced() -> tuple[Balanced, Tensor, Tensor]:
    model = Balanced()
    out = ELBO(model, F.cross_entropy, 10)(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    return model, out.nll, out.kl / 10


def norm_after_backward(layer: nn.Module, term: Tensor) -> float:
    layer.zero_grad()
    term.backward(retain_graph=True)
    return math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters() if p.grad is not None))


def test_gradient_balance_values(balanced: tuple[Balanced, Tensor, Tensor]) -> None:
    model, nll, kl = balanced
    rows = gradient_balance(model, nll, kl)
    assert [row.name for row in rows] == ["first", "head", "unused"]
    for row in rows:
        layer = model.get_submodule(row.name)
        assert row.nll == pytest.approx(norm_after_backward(layer, nll), rel=FLOAT32)
        assert row.kl == pytest.approx(norm_after_backward(layer, kl), rel=FLOAT32)
    first, head, unused = rows
    assert first.nll > 0
    assert first.ratio == pytest.approx(first.kl / first.nll, rel=FLOAT32)
    assert head.ratio == 0.0
    assert unused.nll == 0.0
    assert unused.ratio == math.inf


def test_gradient_balance_has_tied_parameters_once() -> None:
    model = nn.Sequential(bayes(5, 5, bias=False), bayes(5, 5, bias=False))
    model[1].weight_mu, model[1].weight_rho = model[0].weight_mu, model[0].weight_rho
    out = ELBO(model, F.cross_entropy, 10)(torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    assert [row.name for row in gradient_balance(model, out.nll, out.kl)] == ["0"]


def test_gradient_balance_of_nothing_is_nan() -> None:
    model = Balanced()
    model.spare = nn.Linear(2, 2)
    out = ELBO(model, F.cross_entropy, 10)(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    spare = gradient_balance(model, out.nll, out.kl)[-1]
    assert (spare.name, spare.nll, spare.kl) == ("spare", 0.0, 0.0)
    assert math.isnan(spare.ratio)


def test_gradient_balance_keeps_graph_and_grad(balanced: tuple[Balanced, Tensor, Tensor]) -> None:
    model, nll, kl = balanced
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(nll + kl, trained, retain_graph=True)
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, 3.0)
    gradient_balance(model, nll, kl)
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in trained)
    (nll + kl).backward()
    assert all(torch.equal(p.grad, 3.0 + grad) for p, grad in zip(trained, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model, nll, kl: (model, nll.item(), kl), TypeError, "^nll .*tensor.*float"),
        (lambda model, nll, kl: (model, nll, kl.item()), TypeError, "^kl .*tensor.*float"),
        (lambda model, nll, kl: (model, nll.expand(3), kl), ValueError, r"^nll .*scalar.* \(3,\)"),
        (lambda model, nll, kl: (model, nll, kl.detach()), ValueError, "^kl .*without gradient"),
        (lambda model, nll, kl: (nn.ReLU(), nll, kl), ValueError, "^model .*requires grad"),
        (lambda model, nll, kl: (abs, nll, kl), TypeError, "^model .*Module"),
    ],
    ids=["nll_float", "kl_float", "nll_vector", "kl_detached", "nothing_to_train", "no_module"],
)
def test_gradient_balance_errors(
    balanced: tuple[Balanced, Tensor, Tensor],
    change: Callable[..., tuple[Any, Any, Any]],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        gradient_balance(*change(*balanced))

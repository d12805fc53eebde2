"""What type checkers make of the package: mypy reads this file with it (pyproject.toml), nothing runs it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import assert_type

    import fusedbayes as fb
    from fusedbayes.convert import ConversionRow
    from fusedbayes.diagnostics import Report

    model = nn.Linear(5, 3)
    assert_type(fb.to_bayesian(model), nn.Module)
    assert_type(fb.to_bayesian(model, prior=fb.priors.Laplace(), return_report=False), nn.Module)
    converted, report = fb.to_bayesian(model, where="*", init="moped", return_report=True)
    assert_type(converted, nn.Module)
    assert_type(report, Report[ConversionRow])
    assert_type(report[0].outcome, str)
    fb.to_bayesian(model, sigma=0.1)  # type: ignore[call-overload]
    fb.to_bayesian(model, init="median")  # type: ignore[call-overload]

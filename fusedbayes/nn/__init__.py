"""Bayesian layers: parameters, initialisation, priors and state."""

from fusedbayes.nn.linear import BayesLinear
from fusedbayes.nn.module import BayesModule, VariationalParameter, bayes_modules, variational_parameters

__all__ = ["BayesLinear", "BayesModule", "VariationalParameter", "bayes_modules", "variational_parameters"]

"""Bayesian layers: parameters, initialisation, priors and state."""

from fusedbayes.nn.linear import BayesLinear
from fusedbayes.nn.module import BayesModule
from fusedbayes.nn.traverse import VariationalParameter, bayes_modules, variational_parameters

# Every layer: what `fusedbayes.to_bayesian` makes of the class that it replaces.
LAYERS: tuple[type[BayesModule], ...] = (BayesLinear,)

__all__ = ["LAYERS", "BayesLinear", "BayesModule", "VariationalParameter", "bayes_modules", "variational_parameters"]

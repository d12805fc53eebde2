"""Bayesian layers: parameters, initialisation, priors and state."""

from fusedbayes.nn.attention import BayesMultiheadAttention
from fusedbayes.nn.convolution import (
    BayesConv1d,
    BayesConv2d,
    BayesConv3d,
    BayesConvTranspose1d,
    BayesConvTranspose2d,
    BayesConvTranspose3d,
)
from fusedbayes.nn.embedding import BayesEmbedding
from fusedbayes.nn.linear import BayesLinear, BayesTransposedLinear
from fusedbayes.nn.module import BayesModule
from fusedbayes.nn.random_tensor import RandomTensor
from fusedbayes.nn.recurrent import BayesGRU, BayesLSTM, BayesRNN
from fusedbayes.nn.traverse import VariationalParameter, bayes_modules, variational_parameters

# Every layer: what `fusedbayes.to_bayesian` makes of the class that it replaces, or of none as long as the library that
# has the class is not imported.
LAYERS: tuple[type[BayesModule], ...] = (
    *(BayesLinear, BayesTransposedLinear),
    *(BayesConv1d, BayesConv2d, BayesConv3d),
    *(BayesConvTranspose1d, BayesConvTranspose2d, BayesConvTranspose3d),
    BayesEmbedding,
    *(BayesLSTM, BayesGRU, BayesRNN),
    BayesMultiheadAttention,
)

__all__ = [
    "LAYERS",
    "BayesConv1d",
    "BayesConv2d",
    "BayesConv3d",
    "BayesConvTranspose1d",
    "BayesConvTranspose2d",
    "BayesConvTranspose3d",
    "BayesEmbedding",
    "BayesGRU",
    "BayesLSTM",
    "BayesLinear",
    "BayesModule",
    "BayesMultiheadAttention",
    "BayesRNN",
    "BayesTransposedLinear",
    "RandomTensor",
    "VariationalParameter",
    "bayes_modules",
    "variational_parameters",
]

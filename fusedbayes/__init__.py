"""Fused Bayesian layers for PyTorch: sampling, matmul and KL in one pass over the parameters."""

from fusedbayes import functional, nn, noise, reference, schedules
from fusedbayes.convert import to_bayesian, to_deterministic
from fusedbayes.diagnostics import gradient_balance, kl_report
from fusedbayes.functional import gaussian_kl
from fusedbayes.nn import (
    BayesConv1d,
    BayesConv2d,
    BayesConv3d,
    BayesConvTranspose1d,
    BayesConvTranspose2d,
    BayesConvTranspose3d,
    BayesEmbedding,
    BayesGRU,
    BayesLinear,
    BayesLSTM,
    BayesMultiheadAttention,
    BayesRNN,
    BayesTransposedLinear,
)
from fusedbayes.objective import ELBO, ElboOutput, kl_loss
from fusedbayes.ops.backend import Backend, backend_info, use_reference
from fusedbayes.predict import Prediction, frozen_sample, mean_mode, predict
from fusedbayes.version import __version__

__all__ = [
    "ELBO",
    "Backend",
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
    "BayesMultiheadAttention",
    "BayesRNN",
    "BayesTransposedLinear",
    "ElboOutput",
    "Prediction",
    "__version__",
    "backend_info",
    "frozen_sample",
    "functional",
    "gaussian_kl",
    "gradient_balance",
    "kl_loss",
    "kl_report",
    "mean_mode",
    "nn",
    "noise",
    "predict",
    "reference",
    "schedules",
    "to_bayesian",
    "to_deterministic",
    "use_reference",
]

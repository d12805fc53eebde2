"""Triton kernels and their launchers, one pair per idea.

Each launcher takes and returns tensors like the operator of the same name in `fusedbayes.ops`, allocates its outputs,
chooses a configuration unless given one, and validates nothing. On CPU tensors the kernels run through Triton's
interpreter (set ``TRITON_INTERPRET=1`` before the first import), which is how they are tested without a GPU.
"""

if __name__ != "fusedbayes.kernels":
    raise ImportError(f"import this package as fusedbayes.kernels, not as {__name__}")

from fusedbayes.kernels.config import MatmulConfig, TileConfig
from fusedbayes.kernels.linear import bayes_linear
from fusedbayes.kernels.linear_backward_input import bayes_linear_backward_input
from fusedbayes.kernels.linear_backward_weight import bayes_linear_backward_weight
from fusedbayes.kernels.noise import normal_tile, philox_words
from fusedbayes.kernels.sample import sample_weight, weight_kl
from fusedbayes.kernels.sample_backward import sample_weight_backward
from fusedbayes.kernels.select import select_config, select_tile_config

__all__ = [
    "MatmulConfig",
    "TileConfig",
    "bayes_linear",
    "bayes_linear_backward_input",
    "bayes_linear_backward_weight",
    "normal_tile",
    "philox_words",
    "sample_weight",
    "sample_weight_backward",
    "select_config",
    "select_tile_config",
    "weight_kl",
]

"""The kernels and their launchers: Triton's for CUDA here, C++ for the CPU in `fusedbayes.kernels.cpu`.

Each launcher takes and returns tensors like the operator of the same name in `fusedbayes.ops`, allocates its outputs,
chooses a configuration unless given one, and validates nothing. On CPU tensors the Triton kernels run through Triton's
interpreter (set ``TRITON_INTERPRET=1`` before the first import), which is how they are tested without a GPU.
"""

from importlib import import_module
from typing import Any

if __name__ != "fusedbayes.kernels":
    raise ImportError(f"import this package as fusedbayes.kernels, not as {__name__}")

_MODULES = {
    "MatmulConfig": "config",
    "TileConfig": "config",
    "bayes_linear": "linear",
    "bayes_linear_backward": "linear_backward",
    "normal": "noise_of_rows",
    "normal_tile": "noise",
    "philox_words": "noise",
    "sample_weight": "sample",
    "sample_weight_backward": "sample_backward",
    "scale_mixture_kl": "mixture",
    "scale_mixture_kl_backward": "mixture",
    "signs": "noise_of_rows",
    "select_config": "select",
    "select_tile_config": "select",
    "weight_kl": "sample",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports Triton with the first of its launchers that is asked for: the CPU kernel does without."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access finds it without coming here
    return value

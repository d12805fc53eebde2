"""Whose noise is whose within a layer, without Triton: the CPU kernel does without it."""

from torch import Tensor

# What is added to a weight's stream for the noise of its layer's outputs and inputs: `fusedbayes.noise.Role`.
LOCAL, FLIPOUT_INPUT, FLIPOUT_OUTPUT = 2, 3, 4


def sample_after(key: tuple[Tensor, Tensor | None], index: int) -> Tensor | None:
    """The Monte Carlo sample that comes so many after the key's; None is 0."""
    seed, sample = key
    if index == 0:
        return sample
    return seed.new_full((), index) if sample is None else sample + index

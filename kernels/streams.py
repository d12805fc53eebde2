"""Streams and Monte Carlo samples of a layer, without Triton: the CPU kernel does without it."""

from torch import Tensor

# What is added to a weight's stream for the noise of its layer's outputs and inputs: `fusedbayes.noise.Role`.
LOCAL, FLIPOUT_INPUT, FLIPOUT_OUTPUT = 2, 3, 4


def sample_after(key: tuple[Tensor, Tensor | None], index: int) -> Tensor | None:
    """The Monte Carlo sample that comes so many after the key's; None is 0."""
    seed, sample = key
    if index == 0:
        return sample
    return seed.new_full((), index) if sample is None else sample + index


def batch_of(rows: Tensor, index: int, batches: int) -> Tensor:
    """The batch of this number, of as many one after another."""
    return rows if batches == 1 else rows.unflatten(0, (batches, rows.shape[0] // batches))[index]

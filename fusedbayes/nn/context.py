"""What a Bayesian layer is told for a while, by the context managers of prediction and training: noise, samples, KL."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fusedbayes.noise import Address, as_sample
from fusedbayes.reference import Estimator


@dataclass(frozen=True)
class FrozenNoise:
    """The noise of one function draw, as a layer sees it; set by `fusedbayes.frozen_sample`.

    Attributes:
        seed, sample: 0-d int64 tensors on the layer's device.
        addresses: of each of the layer's random tensors, by name.
        estimator: in place of the layer's own, if not None.
        each_sample: whether the Monte Carlo samples of one batch have draws of their own, from `sample` on.
    """

    seed: Tensor
    sample: Tensor
    addresses: dict[str, Address]
    estimator: Estimator | None = None
    each_sample: bool = False


class MeanWeights:
    """Stands in for noise while `fusedbayes.mean_mode` is on: every weight is its posterior mean."""


class Repeated(NamedTuple):
    """A batch, and its repetition for several Monte Carlo samples, with their versions then."""

    tensor: Tensor
    batch: Tensor
    versions: tuple[int, int]

    def is_(self, input: Tensor) -> bool:
        """Whether `input` is the very repetition, and neither was written to since."""
        return input is self.tensor and self.versions == (self.tensor._version, self.batch._version)


class Fold(NamedTuple):
    """What the inputs of a model's layers hold; set by `fusedbayes.folding`.

    Attributes:
        num_samples, batch: so many batches of so many rows along dimension 0, or whole multiples of these rows.
        repeated: the model's own input, if it is a tensor.
    """

    num_samples: int
    batch: int
    repeated: Repeated | None = None

    def holds(self, rows: int) -> bool:
        """Whether so many rows are its batches, or whole multiples of their rows."""
        return rows % (self.num_samples * self.batch or 1) == 0


class FusedKL(NamedTuple):
    """The KL that a forward gave, and the parameters it was given for.

    Attributes:
        kl: 0-d.
        parameters: mu and rho of each random tensor, as the forward saw them.
        requires_grad: of each of them, then.
    """

    kl: Tensor
    parameters: tuple[Tensor, ...]
    requires_grad: tuple[bool, ...]


class Draw(NamedTuple):
    """What one forward of a layer draws.

    Attributes:
        seed, sample: 0-d int64 tensors; None for a fresh seed, and for sample 0.
        addresses: of each random tensor, by name.
        estimator: how the output is sampled.
        num_samples: Monte Carlo samples, each with a batch of its own along dimension 0 of the input.
    """

    seed: Tensor | None
    sample: Tensor | None
    addresses: dict[str, Address]
    estimator: Estimator
    num_samples: int

    def sample_of(self, index: int) -> Tensor | int | None:
        """The Monte Carlo sample of the batch of this index."""
        if index == 0:
            return self.sample
        return index if self.sample is None else self.sample + index

    def key(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Seed and sample of the batch of this index, as the operators take them; there must be a seed."""
        assert self.seed is not None
        sample = self.sample_of(index)
        return self.seed, as_sample(sample, self.seed.device) if isinstance(sample, int) else sample

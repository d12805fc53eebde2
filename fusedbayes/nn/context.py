"""What a Bayesian layer is told for a while, by the context managers of prediction and training: noise, samples, KL."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedbayes import ops
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
    parameters: list[Tensor]
    requires_grad: list[bool]


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

    def normals(
        self, rows: Tensor | int, columns: int, index: int, dtype: torch.dtype, name: str = "weight", role: int = 0
    ) -> Tensor:
        """Normals of the given rows, or of so many, for the batch of this index; there must be a seed.

        Args:
            name: of the random tensor that they belong to.
            role: of the noise in its stream, see `Role`; without one they are the tensor's own.
        """
        return ops.normal(*self._noise(rows, columns, index, name, role), dtype)

    def signs(
        self, rows: int, columns: int, index: int, dtype: torch.dtype, name: str = "weight", *, role: int
    ) -> Tensor:
        """Likewise random signs."""
        return ops.signs(*self._noise(rows, columns, index, name, role), dtype)

    def _noise(self, rows: Tensor | int, columns: int, index: int, name: str, role: int) -> tuple[Any, ...]:
        """The operators' arguments."""
        assert self.seed is not None
        stream, row_offset, column_offset = self.addresses[name]
        sample = self.sample_of(index)
        sample = as_sample(sample, self.seed.device) if isinstance(sample, int) else sample
        if not isinstance(rows, Tensor):
            rows = torch.arange(rows, device=self.seed.device)
        return rows, columns, self.seed, sample, (stream + role, 0 if role else row_offset, column_offset)

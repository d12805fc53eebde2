"""Schedules of the KL weight: functions from the number of training steps already done to `ELBO`'s ``kl_weight``.

`ELBO` divides the KL by the size of the training set, so a weight that averages to 1 over an epoch charges the KL once
per pass over the data. A schedule of your own is any callable from an int to a number >= 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fusedbayes.checks import check_count, check_non_negative, check_number

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Tempered:
    """The same weight T for every minibatch, so that an epoch carries T times the KL.

    T < 1 is a cold posterior (Wenzel et al., "How good is the Bayes posterior in deep neural networks really?", ICML
    2020); T = 1 is the bound.

    Args:
        weight: T, 0 or more.
    """

    weight: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", check_non_negative(self.weight, "weight"))

    def __call__(self, step: int) -> float:
        return self.weight


@dataclass(frozen=True)
class Uniform(Tempered):
    """Weight 1 for every minibatch: each of the M minibatches of an epoch carries 1/M of the KL."""

    weight: float = field(default=1.0, init=False)


@dataclass(frozen=True)
class Blundell:
    """Minibatch i = 1 .. M of each epoch carries the share 2^(M-i) / (2^M - 1) of the KL: the first ones nearly all.

    Blundell et al., "Weight uncertainty in neural networks", ICML 2015, section 3.4. The weight is M times the share,
    so an epoch of equal minibatches carries the KL once.

    Args:
        num_batches: M, minibatches per epoch, 1 or more.
    """

    num_batches: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_batches", check_count(self.num_batches, "num_batches"))

    def __call__(self, step: int) -> float:
        i = step % self.num_batches + 1
        # Both powers divided by 2^M: nothing overflows for thousands of minibatches.
        return self.num_batches * math.ldexp(1.0, -i) / (1.0 - math.ldexp(1.0, -self.num_batches))


@dataclass(frozen=True)
class LinearWarmup:
    """The weight rises linearly, 1/num_steps at the first step, 1 at step `num_steps` and ever after.

    Sønderby et al., "Ladder variational autoencoders", NeurIPS 2016.

    Args:
        num_steps: training steps of the warm-up, 1 or more.
    """

    num_steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", check_count(self.num_steps, "num_steps"))

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.num_steps)


@dataclass(frozen=True)
class Cyclical:
    """A linear warm-up that starts again every `period` steps: it takes the part `ramp` of them, then stays at 1.

    Fu et al., "Cyclical annealing schedule: a simple approach to mitigating KL vanishing", NAACL 2019.

    Args:
        period: training steps of a cycle, 1 or more.
        ramp: part of a cycle that rises, in (0, 1] (default 0.5).
    """

    period: int
    ramp: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", check_count(self.period, "period"))
        object.__setattr__(self, "ramp", check_number(self.ramp, "ramp"))
        if not 0.0 < self.ramp <= 1.0:
            raise ValueError(f"ramp must lie in (0, 1], got {self.ramp}")

    def __call__(self, step: int) -> float:
        rising = max(1, round(self.ramp * self.period))
        return min(1.0, (step % self.period + 1) / rising)

"""Schedules of the KL weight: functions from the number of training steps already done to `ELBO`'s ``kl_weight``.

`ELBO` divides the KL by the size of the training set, so a weight that averages to 1 over an epoch charges the KL once
per pass over the data.
"""

import math
from collections.abc import Callable

from fusedbayes.functional import check_count, check_number

Schedule = Callable[[int], float]


def uniform() -> Schedule:
    """The same weight 1 for every minibatch: each of the M minibatches of an epoch carries 1/M of the KL."""
    return tempered(1.0)


def tempered(weight: float) -> Schedule:
    """Tempering: weight T for every minibatch, so that an epoch carries T times the KL.

    T < 1 is a cold posterior (Wenzel et al., "How good is the Bayes posterior in deep neural networks really?", ICML
    2020); T = 1 is the bound.
    """
    weight = check_kl_weight(weight)
    return lambda step: weight


def blundell(num_batches: int) -> Schedule:
    """Minibatch i = 1 .. M of each epoch carries the share 2^(M-i) / (2^M - 1) of the KL: the first ones nearly all.

    Blundell et al., ICML 2015, section 3.4. The weight is M times the share, so an epoch carries the KL once.

    Args:
        num_batches: M, minibatches per epoch, 1 or more.
    """
    check_count(num_batches, "num_batches")

    def weight(step: int) -> float:
        i = step % num_batches + 1
        # Both powers divided by 2^M: nothing overflows for thousands of minibatches.
        return num_batches * math.ldexp(1.0, -i) / (1.0 - math.ldexp(1.0, -num_batches))

    return weight


def linear_warmup(num_steps: int) -> Schedule:
    """The weight rises linearly, 1/num_steps at the first step, 1 at step `num_steps` and ever after.

    Sønderby et al., "Ladder variational autoencoders", NeurIPS 2016.

    Args:
        num_steps: training steps of the warm-up, 1 or more.
    """
    check_count(num_steps, "num_steps")
    return lambda step: min(1.0, (step + 1) / num_steps)


def cyclical(period: int, *, ramp: float = 0.5) -> Schedule:
    """A linear warm-up that starts again every `period` steps: it takes the part `ramp` of them, then stays at 1.

    Fu et al., "Cyclical annealing schedule: a simple approach to mitigating KL vanishing", NAACL 2019.

    Args:
        period: training steps of a cycle, 1 or more.
        ramp: part of a cycle that rises, in (0, 1].
    """
    check_count(period, "period")
    if not 0.0 < check_number(ramp, "ramp") <= 1.0:
        raise ValueError(f"ramp must lie in (0, 1], got {ramp}")
    rise = linear_warmup(max(1, round(ramp * period)))
    return lambda step: rise(step % period)


def check_kl_weight(weight: float) -> float:
    """Returns the number `weight`; raises TypeError or ValueError unless it is finite and not negative."""
    if check_number(weight, "kl_weight") < 0.0:
        raise ValueError(f"kl_weight must not be negative, got {weight}")
    return float(weight)

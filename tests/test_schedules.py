"""Schedules of the KL weight: what each step weighs, and what an epoch adds up to, alone and through `ELBO`."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusedbayes import ELBO, BayesLinear
from fusedbayes.schedules import Blundell, Cyclical, LinearWarmup, Schedule, Tempered, Uniform


@pytest.mark.parametrize("num_batches", [1, 7, 5000])
def test_uniform_charges_one_mth_per_minibatch(num_batches: int) -> None:
    schedule = Uniform()
    shares = [schedule(step) / num_batches for step in range(num_batches)]
    assert shares == [1 / num_batches] * num_batches


@pytest.mark.parametrize("num_batches", [1, 2, 7, 60])
def test_blundell_shares(num_batches: int) -> None:
    schedule = Blundell(num_batches)
    for step in range(2 * num_batches):  # the second epoch repeats the first
        i = step % num_batches + 1
        share = Fraction(2 ** (num_batches - i), 2**num_batches - 1)
        # Three roundings of 2^-53: 1 - 2^-M, the product and the quotient.
        assert schedule(step) == pytest.approx(float(num_batches * share), rel=4e-16, abs=0.0)


@pytest.mark.parametrize("num_batches", [1, 7, 60, 5000])
def test_blundell_charges_the_kl_once_per_epoch(num_batches: int) -> None:
    schedule = Blundell(num_batches)
    weights = [schedule(step) for step in range(num_batches)]
    assert all(0.0 <= weight <= num_batches for weight in weights)
    assert math.fsum(weights) / num_batches == pytest.approx(1.0, rel=4e-16)


@pytest.mark.parametrize("num_steps", [1, 4, 1000])
def test_linear_warmup_rises_to_one_and_stays(num_steps: int) -> None:
    schedule = LinearWarmup(num_steps)
    weights = [schedule(step) for step in range(num_steps)]
    assert weights[0] == 1 / num_steps
    assert weights[-1] == schedule(num_steps) == schedule(10**6) == 1.0
    steps = [after - before for before, after in itertools.pairwise(weights)]
    assert steps == pytest.approx([1 / num_steps] * (num_steps - 1))
    assert math.fsum(weights) == pytest.approx((num_steps + 1) / 2)


@pytest.mark.parametrize(
    ("period", "ramp", "expected"),
    [
        (8, 0.5, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (5, 1.0, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (3, 0.01, [1.0, 1.0, 1.0]),
        (1, 0.5, [1.0]),
    ],
    ids=["half_a_cycle", "whole_cycle", "no_step_long", "period_of_one"],
)
def test_cyclical_ramp_plateau_and_restart(period: int, ramp: float, expected: list[float]) -> None:
    schedule = Cyclical(period, ramp=ramp)
    weights = [schedule(step) for step in range(3 * period)]
    assert weights == pytest.approx(3 * expected)


def test_cyclical_rises_for_half_of_its_period_unless_told() -> None:
    schedule, explicit = Cyclical(20), Cyclical(20, ramp=0.5)
    assert [schedule(step) for step in range(40)] == [explicit(step) for step in range(40)]


@pytest.mark.parametrize("weight", [0, 0.3, 2.0])
def test_tempered_is_constant(weight: float) -> None:
    schedule = Tempered(weight)
    assert {schedule(step) for step in (0, 1, 17, 10**6)} == {weight}


def charged_per_epoch(batch_sizes: list[int], schedule: Schedule) -> list[float]:
    """For each of two epochs, the sum over minibatches of batch_size * kl_weight * kl / num_data, in units of the KL.

    The factor batch_size turns ELBO's loss, a mean over the minibatch, into the minibatch's share of the bound.
    """
    model = BayesLinear(3, 2, dtype=torch.float64)
    elbo = ELBO(model, F.cross_entropy, sum(batch_sizes), kl_weight=schedule)
    totals = []
    for _ in range(2):
        charged = 0.0
        for size in batch_sizes:
            out = elbo(torch.randn(size, 3, dtype=torch.float64), torch.randint(0, 2, (size,)))
            charged += size * ((out.loss - out.nll) / out.kl).item()
        totals.append(charged)
    return totals


EVEN, LAST_IS_SMALLER = [16, 16, 16, 16], [16, 16, 16, 2]


@pytest.mark.parametrize(
    ("batch_sizes", "schedule", "expected"),
    [
        (EVEN, Uniform(), [1.0, 1.0]),
        (EVEN, Tempered(0.3), [0.3, 0.3]),
        (EVEN, Blundell(4), [1.0, 1.0]),
        (EVEN, LinearWarmup(8), [(1 + 2 + 3 + 4) / 32, (5 + 6 + 7 + 8) / 32]),
        (EVEN, Cyclical(4), [(0.5 + 1 + 1 + 1) / 4] * 2),
        # A constant weight charges the KL exactly once however the data are divided: the sizes add up to num_data.
        (LAST_IS_SMALLER, Uniform(), [1.0, 1.0]),
        (LAST_IS_SMALLER, Tempered(0.3), [0.3, 0.3]),
        # Blundell's shares 8, 4, 2, 1 of 15 meet minibatches of 16, 16, 16 and 2 / 12.5 of the average size: above 1.
        (LAST_IS_SMALLER, Blundell(4), [(14 * 16 + 1 * 2) / (15 * 12.5)] * 2),
    ],
    ids=[
        *("uniform", "tempered", "blundell", "linear_warmup", "cyclical"),
        *("uniform_uneven", "tempered_uneven", "blundell_uneven"),
    ],
)
def test_kl_charged_through_the_objective(batch_sizes: list[int], schedule: Schedule, expected: list[float]) -> None:
    # The difference of loss and nll, both about 1, loses some digits of float64.
    assert charged_per_epoch(batch_sizes, schedule) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("make", "argument", "value", "error", "message"),
    [
        (Tempered, "weight", -0.1, ValueError, r"negative.* -0\.1"),
        (Tempered, "weight", math.inf, ValueError, "finite.* inf"),
        (Tempered, "weight", None, TypeError, "number.*NoneType"),
        (Blundell, "num_batches", 0, ValueError, "at least 1.* 0"),
        (Blundell, "num_batches", 4.0, TypeError, "int.*float"),
        (LinearWarmup, "num_steps", -1, ValueError, "at least 1.* -1"),
        (LinearWarmup, "num_steps", True, TypeError, "int.*bool"),
        (Cyclical, "period", 0, ValueError, "at least 1.* 0"),
        (lambda value: Cyclical(4, ramp=value), "ramp", 0.0, ValueError, r"\(0, 1\].* 0\.0"),
        (lambda value: Cyclical(4, ramp=value), "ramp", 1.5, ValueError, r"\(0, 1\].* 1\.5"),
        (lambda value: Cyclical(4, ramp=value), "ramp", "half", TypeError, "number.*str"),
    ],
)
def test_bad_arguments(
    make: Callable[[Any], Schedule], argument: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{argument} .*{message}"):
        make(value)

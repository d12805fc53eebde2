"""The noise is standard normal and independent along every coordinate. Seeds are fixed: a pass is a pass for good."""

from collections.abc import Callable

import pytest
import scipy.stats
import torch
from torch import Tensor

from fusedbayes import noise

SEED = 2024
ROWS, COLUMNS = 509, 516  # a prime, and a multiple of four so that the lanes of a quad have equally many

# power: E[z^p] and Var[z^p] = E[z^2p] - E[z^p]^2
MOMENTS = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}


def draw(**where: int) -> Tensor:
    return noise.normal(**({"seed": SEED, "rows": ROWS, "columns": COLUMNS} | where), dtype=torch.float64)


@pytest.fixture(scope="module")
def block() -> Tensor:
    return draw()


def lanes(block: Tensor) -> list[Tensor]:
    """The whole block, and each of the four normals of a Philox call by itself."""
    return [block.flatten(), *(block[:, lane::4].flatten() for lane in range(4))]


@pytest.mark.parametrize("power", MOMENTS)
def test_moments(block: Tensor, power: int) -> None:
    mean, variance = MOMENTS[power]
    for values in lanes(block):
        standard_error = (variance / values.numel()) ** 0.5
        assert abs(values.pow(power).mean().item() - mean) < 5 * standard_error


def test_distribution_is_normal(block: Tensor) -> None:
    for values in lanes(block):
        # 5.7e-7 is the two-sided probability of five standard errors.
        assert scipy.stats.kstest(values.numpy(), "norm").pvalue > 5.7e-7


def test_tails_reach_as_far_as_they_should(block: Tensor) -> None:
    beyond = (block.abs() > 4).sum().item()
    expected = block.numel() * 2 * scipy.stats.norm.sf(4)
    assert abs(beyond - expected) < 5 * expected**0.5  # a Poisson count
    assert block.abs().max() <= 6.77


@pytest.mark.parametrize(
    "neighbour",
    [
        pytest.param(lambda z: (z[:, :-1], z[:, 1:]), id="columns"),
        pytest.param(lambda z: (z[:, 0::4], z[:, 1::4]), id="one-radius"),
        pytest.param(lambda z: (z[:, 0::4], z[:, 2::4]), id="one-quad"),
        pytest.param(lambda z: (z[:, :-4], z[:, 4:]), id="quads"),
        pytest.param(lambda z: (z[:-1], z[1:]), id="rows"),
        pytest.param(lambda z: (z[:, : z.shape[0]].triu(1), z[:, : z.shape[0]].T.triu(1)), id="transposed"),
        pytest.param(lambda z: (z, draw(sample=1)), id="samples"),
        pytest.param(lambda z: (z, draw(stream=1)), id="streams"),
        pytest.param(lambda z: (z, draw(seed=SEED + 1)), id="seeds"),
        pytest.param(lambda z: (z, draw(seed=SEED + 2**32)), id="high-words-of-the-seed"),
    ],
)
def test_neighbours_are_uncorrelated(block: Tensor, neighbour: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    first, second = (values.flatten() for values in neighbour(block))
    drawn = first != 0  # triu leaves zeros
    first, second = first[drawn], second[drawn]
    # Squares show what the sign of an angle would hide.
    for pair in (torch.stack([first, second]), torch.stack([first, second]).square()):
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 * first.numel() ** -0.5

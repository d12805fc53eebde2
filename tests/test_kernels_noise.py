"""The noise's device functions: the words of `fusedbayes.noise`, and normals that no tiling changes."""

from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from problems import EXTREME_NORMALS, EXTREME_WORDS
from torch import Tensor

from fusedbayes import kernels, noise
from fusedbayes.kernels import TileConfig, normal_tile, philox_words
from fusedbayes.kernels import noise as kernel_noise
from fusedbayes.noise import Address


@triton.jit
def _words_kernel(
    words_ptr,  # (4, SIZE) int64
    quads_ptr,  # (SIZE,) int64
    rows_ptr,  # (SIZE,) int64
    seed_ptr,  # () int64
    sample,
    stream,
    SIZE: tl.constexpr,
):
    index = tl.arange(0, SIZE)
    quads, rows = tl.load(quads_ptr + index), tl.load(rows_ptr + index)
    x0, x1, x2, x3 = philox_words(tl.load(seed_ptr), quads, rows, sample, stream)
    tl.store(words_ptr + index, x0.to(tl.int64))
    tl.store(words_ptr + SIZE + index, x1.to(tl.int64))
    tl.store(words_ptr + 2 * SIZE + index, x2.to(tl.int64))
    tl.store(words_ptr + 3 * SIZE + index, x3.to(tl.int64))


@triton.jit
def _normal_kernel(
    eps_ptr,  # (R, C) fp32 row-major
    seed_ptr,  # () int64
    R,
    C,
    row_offset,
    quad_offset,
    sample,
    stream,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    local_rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    local_columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    quads = quad_offset + tl.program_id(1) * (BLOCK_C // 4) + tl.arange(0, BLOCK_C // 4)
    eps = normal_tile(tl.load(seed_ptr), row_offset + local_rows, quads, sample, stream)
    in_bounds = (local_rows[:, None] < R) & (local_columns[None, :] < C)
    tl.store(eps_ptr + local_rows[:, None] * C + local_columns[None, :], eps, mask=in_bounds)


def kernel_normal(
    device: str,
    seed: int,
    rows: int,
    columns: int,
    *,
    sample: int = 0,
    stream: int = 0,
    row_offset: int = 0,
    quad_offset: int = 0,
    block: tuple[int, int] = (8, 16),
) -> Tensor:
    eps = torch.empty(rows, columns, device=device)
    grid = (triton.cdiv(rows, block[0]), triton.cdiv(columns, block[1]))
    where = (row_offset, quad_offset, sample, stream)
    _normal_kernel[grid](eps, noise.as_seed(seed, device), rows, columns, *where, *block)
    return eps


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize(
    ("sample", "stream"),
    [(0, 0), (1, 7), (2**31 - 1, 2**31), (2**32 - 1, 2**32 - 1)],
    ids=["zero", "small", "int32", "end"],
)
def test_words_equal_pytorch_words(kernel_device: str, seed: int, sample: int, stream: int) -> None:
    corners = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    quads, rows = torch.randint(0, 2**32, (2, 64))
    quads[:5], rows[:5] = corners, corners.flip(0)
    words = torch.empty(4, 64, dtype=torch.int64, device=kernel_device)
    coordinates = quads.to(kernel_device), rows.to(kernel_device)
    _words_kernel[(1,)](words, *coordinates, noise.as_seed(seed, kernel_device), sample, stream, SIZE=64)
    assert torch.equal(words.cpu(), torch.stack(noise.philox_words(seed, quads, rows, sample, stream)))


@pytest.mark.parametrize(
    ("row_offset", "quad_offset"),
    [(0, 0), (2**31 - 5, 2**31 - 2), (2**32 - 33, 2**32 - 11)],
    ids=["origin", "across-int32", "end"],
)
def test_normals_equal_pytorch_normals(kernel_device: str, row_offset: int, quad_offset: int) -> None:
    where = {"sample": 3, "stream": 2**31 + 1, "row_offset": row_offset}
    eps = kernel_normal(kernel_device, 12345678901234, 33, 41, **where, quad_offset=quad_offset)
    expected = noise.normal(12345678901234, 33, 41, **where, column_offset=4 * quad_offset)
    torch.testing.assert_close(eps.cpu(), expected, rtol=0, atol=1e-5)  # the contract's bound


def test_normals_at_the_ends_of_the_words(kernel_device: str) -> None:
    for (quad, row, sample, stream), expected in zip(EXTREME_WORDS, EXTREME_NORMALS, strict=True):
        eps = kernel_normal(kernel_device, 0, 1, 4, sample=sample, stream=stream, row_offset=row, quad_offset=quad)
        torch.testing.assert_close(eps.cpu(), torch.tensor([expected]), rtol=0, atol=1e-5)


def test_a_radius_is_right_whatever_the_approximations_do() -> None:
    """Box-Muller's for several samples, logarithm and root at the ends of PTX's bounds, for all u in [0.75, 1]."""
    distance = torch.arange(2**22, dtype=torch.float64) * 2.0**-24
    exact = (-2.0 * torch.log1p(-distance)).sqrt()
    larger = ((1.0 - distance) * kernel_noise.WIDER.value).float().double()
    line = (kernel_noise.SLOPE.value * distance).float().double()
    for of_logarithm, of_root in product((-1.0, 1.0), repeat=2):
        logarithm = (larger.log2() + of_logarithm * 2.0**-22).float().double()
        root = torch.maximum(-logarithm, line).sqrt() * (1.0 + of_root * 2.0**-23)
        radius = kernel_noise.ROOT.value * root.float().double()
        assert (radius - exact).abs().max() < 6.8e-6  # docs/kernels.md; the contract's bound is 1e-5


def test_normals_do_not_depend_on_the_tile(kernel_device: str) -> None:
    blocks = [(2, 4), (1, 64), (16, 16), (32, 8)]
    first, *others = (kernel_normal(kernel_device, 4, 11, 37, stream=1, block=block) for block in blocks)
    for other in others:
        assert torch.equal(first, other)


def test_normals_of_a_shard_are_its_part_of_the_whole(kernel_device: str) -> None:
    whole = kernel_normal(kernel_device, 4, 19, 52)
    shard = kernel_normal(kernel_device, 4, 12, 32, row_offset=7, quad_offset=5)
    assert torch.equal(shard, whole[7:, 20:])


@pytest.mark.parametrize("columns", [0, 1, 16, 41])
@pytest.mark.parametrize(
    "address", [Address(2**31 + 1), Address(3, 5, 3), Address(0, 2**31 - 3, 2**33 - 2)], ids=["origin", "shard", "end"]
)
def test_noise_of_given_rows(kernel_device: str, address: Address, columns: int) -> None:
    """Like tokens of a vocabulary: in any order, again and again."""
    rows = torch.tensor([4, 0, 2**31 - 4, 4, 7, 1])
    key = noise.as_seed(2**62 + 5, kernel_device), torch.tensor(3, device=kernel_device), address
    given = torch.stack([rows, -rows], 1).to(kernel_device)[:, 0]  # not adjacent in memory
    eps = kernels.normal(given, columns, *key, torch.float32, config=TileConfig(4, 16))
    stream, *offsets = address
    where = {"sample": 3, "stream": stream, "row_offset": offsets[0], "column_offset": offsets[1]}
    expected = noise.normal(2**62 + 5, rows, columns, **where)
    torch.testing.assert_close(eps.cpu(), expected, rtol=0, atol=1e-5)
    narrow = kernels.normal(given, columns, *key, torch.bfloat16)
    torch.testing.assert_close(narrow, eps.bfloat16(), rtol=2.0**-7, atol=0)  # the interpreter cuts bits off
    assert torch.equal(eps[0], eps[3])
    signs = kernels.signs(given, columns, *key, torch.float16, config=TileConfig(4, 16))
    assert torch.equal(signs.cpu(), noise.signs(2**62 + 5, rows, columns, **where, dtype=torch.float16))
    assert kernels.normal(given[:0], columns, *key, torch.float32).shape == (0, columns)

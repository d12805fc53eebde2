"""The noise contract: known answers, and noise that depends on its address alone."""

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import EXTREME_NORMALS, EXTREME_WORDS

from fusedbayes import noise

# Random123's vectors for seven rounds: counter, key, words.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
}
CORNERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)


def philox_in_python(seed: int, counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-7 in unbounded integers: an oracle that cannot overflow."""
    low_0, high_0, low_1, high_1 = counter
    key_0, key_1 = seed % 2**32, seed // 2**32
    for _ in range(7):
        product_0, product_1 = 0xD2511F53 * low_0, 0xCD9E8D57 * low_1
        low_0, high_0 = product_1 // 2**32 ^ high_0 ^ key_0, product_1 % 2**32
        low_1, high_1 = product_0 // 2**32 ^ high_1 ^ key_1, product_0 % 2**32
        key_0, key_1 = (key_0 + 0x9E3779B9) % 2**32, (key_1 + 0xBB67AE85) % 2**32
    return low_0, high_0, low_1, high_1


def normal_in_python(seed: int, row: int, column: int, sample: int, stream: int) -> float:
    words = philox_in_python(seed, (column // 4, row, sample, stream))
    radius_word, angle_word = words[:2] if column % 4 < 2 else words[2:]
    angle = math.pi * (angle_word - 2**32 * (angle_word >= 2**31)) * 2.0**-31
    radius = math.sqrt(-2.0 * math.log(radius_word * 2.0**-32 + 2.0**-33))
    return radius * (math.cos(angle) if column % 2 == 0 else math.sin(angle))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys())
def test_words_are_the_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    quads, rows = torch.tensor([counter[0]]), torch.tensor([counter[1]])
    words = noise.philox_words(key[0] + (key[1] << 32), quads, rows, counter[2], counter[3])
    assert tuple(word.item() for word in words) == expected
    assert philox_in_python(key[0] + (key[1] << 32), counter) == expected


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63, 2**64 - 1])
def test_words_at_the_ends_of_the_address_space(seed: int) -> None:
    quads, rows = torch.tensor(CORNERS)[None, :], torch.tensor(CORNERS)[:, None]
    for sample, stream in ((0, 2**32 - 1), (2**32 - 1, 0), (2**31, 2**31 - 1)):
        words = torch.stack(noise.philox_words(seed, quads, rows, sample, stream), -1)
        expected = [[philox_in_python(seed, (quad, row, sample, stream)) for quad in CORNERS] for row in CORNERS]
        assert words.tolist() == [[list(four) for four in row] for row in expected]


@pytest.mark.parametrize(
    ("row_offset", "column_offset"),
    [(0, 0), (2**31 - 2, 3), (70_000, 70_001), (2**32 - 3, 2**34 - 7)],
    ids=["origin", "rows-past-int32", "elements-past-int32", "last-element"],
)
def test_normals_beyond_32_bit_indices(row_offset: int, column_offset: int) -> None:
    where = {"sample": 2**31 + 5, "stream": 2**32 - 2}
    eps = noise.normal(9, 3, 7, **where, row_offset=row_offset, column_offset=column_offset, dtype=torch.float64)
    expected = [[normal_in_python(9, row_offset + i, column_offset + j, **where) for j in range(7)] for i in range(3)]
    # The uniforms are rounded to fp32 by contract, which moves a normal of at most 6.8 by less than 1e-5.
    torch.testing.assert_close(eps, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_normals_at_the_ends_of_the_words(dtype: torch.dtype) -> None:
    for ((quad, row, sample, stream), words), expected in zip(EXTREME_WORDS.items(), EXTREME_NORMALS, strict=True):
        assert philox_in_python(0, (quad, row, sample, stream)) == words
        where = {"row_offset": row, "column_offset": 4 * quad, "sample": sample, "stream": stream}
        eps = noise.normal(0, 1, 4, **where, dtype=dtype)
        torch.testing.assert_close(eps, torch.tensor([expected], dtype=dtype), rtol=0, atol=1e-5)


def test_float64_is_the_noise_of_float32() -> None:
    single = noise.normal(3, 250, 251)
    double = noise.normal(3, 250, 251, dtype=torch.float64)
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert not torch.equal(double, double.float().double())
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)  # the contract's bound


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    row=st.integers(0, 9),
    column=st.integers(0, 17),
    rows=st.integers(0, 5),
    columns=st.integers(0, 9),
    base_row=st.sampled_from([0, 1000, 2**32 - 14]),
    base_column=st.sampled_from([0, 5, 2**34 - 26]),
)
def test_a_shard_draws_its_part_of_the_whole(
    row: int, column: int, rows: int, columns: int, base_row: int, base_column: int
) -> None:
    whole = noise.normal(7, 14, 26, stream=3, row_offset=base_row, column_offset=base_column)
    offsets = {"row_offset": base_row + row, "column_offset": base_column + column}
    shard = noise.normal(7, rows, columns, stream=3, **offsets)
    assert torch.equal(shard, whole[row : row + rows, column : column + columns])


def test_rows_in_any_order() -> None:
    where: dict[str, Any] = {"sample": 4, "stream": 3, "column_offset": 2}
    whole = noise.normal(7, 40_000, 5, row_offset=6, **where)
    rows = torch.randint(0, 40_000, (30_000,))  # more than are drawn at once
    rows[0] = rows[-1]
    assert torch.equal(noise.normal(7, rows, 5, row_offset=6, **where), whole[rows])
    assert torch.equal(noise.normal(7, rows + 6, 5, **where), whole[rows])
    signs = noise.signs(7, 40_000, 5, row_offset=6, **where)
    assert torch.equal(noise.signs(7, rows, 5, row_offset=6, **where), signs[rows])
    assert noise.normal(7, rows[:0], 5).shape == (0, 5)


def test_noise_does_not_depend_on_the_working_set() -> None:
    """A wide block is drawn in chunks of a few rows, a narrow one at once."""
    wide = noise.normal(11, 5, 150_001)
    assert torch.equal(noise.normal(11, 5, 33), wide[:, :33])
    assert torch.equal(noise.normal(11, 1, 1_001, row_offset=4, column_offset=149_000), wide[4:, 149_000:])


def test_each_coordinate_counts() -> None:
    base: dict[str, Any] = {"seed": 5, "sample": 0, "stream": 0, "row_offset": 0, "column_offset": 0}
    changes = ({"seed": 6}, {"seed": 5 + 2**32}, {"sample": 1}, {"stream": 1}, {"row_offset": 1}, {"column_offset": 4})
    blocks = [noise.normal(rows=1, columns=4, **(base | change)) for change in ({}, *changes)]
    values = torch.cat(blocks).flatten()
    assert values.unique().numel() == values.numel()


def test_block_has_the_asked_shape_dtype_and_device() -> None:
    assert noise.normal(0, 0, 5).shape == (0, 5)
    assert noise.normal(0, 5, 0, column_offset=3).shape == (5, 0)
    assert noise.normal(torch.tensor(0), 2, 3, device="cpu").device.type == "cpu"


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 + 5])
def test_a_seed_counts_by_its_64_bits(seed: int) -> None:
    assert noise.as_seed(seed).item() % 2**64 == seed % 2**64
    assert torch.equal(noise.normal(seed, 2, 5), noise.normal(seed % 2**64, 2, 5))
    assert torch.equal(noise.normal(seed, 2, 5), noise.normal(noise.as_seed(seed), 2, 5))


def test_a_sample_may_be_a_tensor() -> None:
    expected = noise.normal(3, 2, 5, sample=2**31 + 1)
    assert torch.equal(noise.normal(3, 2, 5, sample=torch.tensor(2**31 + 1)), expected)


def test_draw_seed_follows_the_generator_of_torch() -> None:
    torch.manual_seed(1)
    first, second = noise.draw_seed(), noise.draw_seed()
    torch.manual_seed(1)
    again = noise.draw_seed()
    assert first.dtype == torch.int64
    assert first.shape == ()
    assert first == again
    assert first != second
    seeds = torch.stack([noise.draw_seed() for _ in range(64)])
    # Both halves of the key vary: 64 draws repeat a 31-bit half with probability 64^2 / 2^32, one in a million.
    assert (seeds >= 0).all()
    assert (seeds >> 32).unique().numel() == (seeds & 0xFFFFFFFF).unique().numel() == 64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got 1.5"),
        ({"seed": True}, TypeError, "seed must be .* got True"),
        (
            {"seed": torch.tensor(1, dtype=torch.int32)},
            TypeError,
            r"seed must be an int or an int64 .* got .* torch\.int32",
        ),
        ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must be a 0-d tensor, got shape \(2,\)"),
        ({"seed": 2**64}, ValueError, f"seed must lie in .* got {2**64}"),
        ({"seed": -(2**63) - 1}, ValueError, f"seed must lie in .* got {-(2**63) - 1}"),
        ({"dtype": torch.float16}, TypeError, r"dtype must be torch\.float32 or torch\.float64, got torch\.float16"),
        ({"rows": 2.0}, TypeError, "rows must be an int, got 2.0"),
        ({"rows": torch.ones(2)}, TypeError, "rows must be an int or an int64 vector, got"),
        ({"rows": torch.ones(2, 2, dtype=torch.int64)}, ValueError, "rows must be an int or an int64 vector, got"),
        ({"columns": True}, TypeError, "columns must be an int, got True"),
        ({"rows": -1}, ValueError, "rows must not be negative, got -1"),
        ({"columns": -2}, ValueError, "columns must not be negative, got -2"),
        ({"row_offset": -3}, ValueError, "row_offset must not be negative, got -3"),
        ({"column_offset": -4}, ValueError, "column_offset must not be negative, got -4"),
        ({"sample": 0.0}, TypeError, "sample must be an int or a 0-d int64 tensor, got 0.0"),
        ({"sample": torch.ones(1, dtype=torch.int64)}, ValueError, r"sample must be a 0-d tensor, got shape \(1,\)"),
        ({"sample": -5}, ValueError, rf"sample must lie in \[0, {2**32}\), got -5"),
        ({"stream": "0"}, TypeError, "stream must be an int, got '0'"),
        ({"sample": 2**32}, ValueError, rf"sample must lie in \[0, {2**32}\), got {2**32}"),
        ({"stream": 2**32}, ValueError, rf"stream must address less than 2\*\*32, got {2**32}"),
        ({"row_offset": 2**32 - 1}, ValueError, rf"row_offset \+ rows must address less than 2\*\*32, got {2**32}"),
        (
            {"column_offset": 2**34 - 2},
            ValueError,
            rf"column_offset \+ columns must address less than 2\*\*34, got {2**34}",
        ),
    ],
)
def test_bad_argument_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noise.normal(**({"seed": 0, "rows": 2, "columns": 3} | arguments))


AROUND = st.integers(-1, 5) | st.integers(2**32 - 3, 2**32 + 1) | st.integers(2**34 - 3, 2**34 + 1)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(rows=AROUND, columns=AROUND, stream=AROUND, row_offset=AROUND, column_offset=AROUND)
def test_coordinates_are_refused_outside_the_address_space_alone(**coordinates: int) -> None:
    inside = (
        min(coordinates.values()) >= 0
        and coordinates["stream"] < 2**32
        and coordinates["row_offset"] + coordinates["rows"] <= 2**32
        and coordinates["column_offset"] + coordinates["columns"] <= 2**34
    )
    with contextlib.nullcontext() if inside else pytest.raises(ValueError, match="must"):
        noise.check_coordinates(**coordinates)

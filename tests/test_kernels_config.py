"""Launch configurations: a pure function of the problem, and tiles that Triton can compile."""

import pickle
import pkgutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedbayes import kernels
from fusedbayes.kernels import MatmulConfig, TileConfig, select_config, select_tile_config

sizes = st.one_of(st.integers(0, 300), st.sampled_from([2**k + d for k in range(9, 24) for d in (-1, 0, 1)]))


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    kernel=st.sampled_from(["forward", "backward_input", "backward_weight"]),
    shape=st.tuples(sizes, sizes, sizes),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    capability=st.sampled_from([(0, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]),
)
def test_matmul_configurations_are_valid(
    kernel: Any, shape: tuple[int, int, int], dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    config = select_config(kernel, shape, dtype, capability)
    assert config == select_config(kernel, shape, dtype, capability)
    blocks = (config.block_m, config.block_n, config.block_k)
    assert all(is_power_of_two(block) and block >= 16 for block in blocks)  # 16 is tl.dot's smallest
    assert max(blocks) * sorted(blocks)[1] <= 2**20  # the largest tile that Triton takes
    assert is_power_of_two(config.num_warps)
    assert config.num_warps <= 32
    assert config.num_stages >= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shape=st.tuples(sizes, sizes))
def test_tile_configurations_are_valid(shape: tuple[int, int]) -> None:
    config = select_tile_config(shape)
    assert config == select_tile_config(shape)
    assert is_power_of_two(config.block_n)
    assert is_power_of_two(config.block_k)
    assert config.block_k >= 4  # a quad of normals
    assert config.block_n * config.block_k <= 2**20
    assert is_power_of_two(config.num_warps)
    assert config.num_warps <= 32


@pytest.mark.parametrize("kernel", ["forward", "backward_input"])
def test_a_small_batch_is_one_pass_and_a_large_one_samples_once(kernel: Any) -> None:
    for rows in (1, 16, 17, 32, 100, 128, 256):
        config = select_config(kernel, (rows, 4096, 4096), torch.bfloat16, (9, 0))
        assert config.single_pass
        # One tile holds the batch, as a second would draw the weights again, and no half of it is empty.
        assert rows <= config.block_m < 2 * max(rows, 16)
    assert not select_config(kernel, (16384, 4096, 4096), torch.bfloat16, (9, 0)).single_pass


def test_the_configuration_does_not_follow_the_ragged_end_of_a_dimension() -> None:
    """A training run's last, smaller batch does not recompile for each of its sizes."""
    configs = {select_config("forward", (rows, 1000, 1001), torch.float16, (9, 0)) for rows in range(65, 129)}
    assert len(configs) == 1


@pytest.mark.parametrize("config", [MatmulConfig(16, 32, 64), TileConfig(16, 128)], ids=["matmul", "tile"])
def test_configurations_are_values(config: MatmulConfig | TileConfig) -> None:
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, pickle.loads(pickle.dumps(config))}) == 1
    with pytest.raises(AttributeError):
        config.num_warps = 1  # type: ignore[misc]


@pytest.mark.parametrize("kernel", ["forward", "backward_input"])
def test_a_split_sum_fills_the_device(kernel: Any) -> None:
    for N, K in ((1024, 1024), (4096, 4096), (512, 16384), (16384, 512)):
        config = select_config(kernel, (64, N, K), torch.bfloat16, (9, 0))
        result, terms = (N // config.block_n, K // config.block_k)
        if kernel == "backward_input":
            result, terms = K // config.block_k, N // config.block_n
        programs = result * config.splits
        # At most 8 warps for each of 132 multiprocessors, and half of that unless a split would have fewer than four
        # tiles to add.
        assert programs * config.num_warps <= 8 * 132 or config.splits == 1
        assert programs * config.num_warps > 4 * 132 or terms // config.splits in range(4, 8)


def test_ragged_columns_are_sampled_once() -> None:
    """A quad of columns is one Philox call and one load: what has no whole quads goes through the sampling pass."""
    assert select_config("forward", (64, 4096, 4096), torch.bfloat16, (9, 0)).single_pass
    assert select_config("forward", (64, 4095, 4092), torch.bfloat16, (9, 0)).single_pass
    assert not select_config("forward", (64, 4096, 4095), torch.bfloat16, (9, 0)).single_pass


@pytest.mark.parametrize("kernel", ["forward", "backward_input", "backward_weight"])
def test_what_32_bits_cannot_address_is_sampled_once(kernel: Any) -> None:
    assert select_config(kernel, (64, 128, 2**22), torch.bfloat16, (9, 0)).single_pass
    assert not select_config(kernel, (64, 128, 2**24 + 4), torch.bfloat16, (9, 0)).single_pass


@pytest.mark.parametrize(("kernel", "sizes"), [("forward", (2**23, 128)), ("backward_input", (128, 2**23))])
def test_results_that_32_bits_cannot_address_are_sampled_once(kernel: Any, sizes: tuple[int, int]) -> None:
    assert select_config(kernel, (128, *sizes), torch.bfloat16, (9, 0)).single_pass
    assert not select_config(kernel, (256, *sizes), torch.bfloat16, (9, 0)).single_pass


def test_no_launcher_is_hidden_by_a_module_of_its_name() -> None:
    """An import of the module would take the launcher's place in the package, wherever it comes from."""
    assert not {module.name for module in pkgutil.iter_modules(kernels.__path__)} & set(kernels.__all__)

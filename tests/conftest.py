"""Shared set-up: where kernels run, poisoned memory, seeds and tolerances."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch

if not torch.cuda.is_available():
    # Read when @triton.jit decorates, hence before the package is imported: kernels run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from interpreted import patch_language_once

        patch_language_once()
# The tensors are tiny and the tests run side by side: a second thread each would only fight for the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="compiled", marks=pytest.mark.gpu)]
)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where a kernel is launched: interpreted on the CPU, or compiled on the GPU where there is one."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    return request.param


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Fixed seed; and torch.empty holds NaN, so that what a kernel forgets to write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernel's own memory is of NaN, like all fresh memory in the tests, and not of the W of another test."""
    linear = importlib.import_module("fusedbayes.kernels.cpu.linear")
    monkeypatch.setattr(linear, "_workspace", linear._Workspace())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a few rows of W at a time."""
    monkeypatch.setattr("fusedbayes.kernels.cpu.linear.BLOCK", 200)


@pytest.fixture(params=["mm", "oneDNN"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products with W^T by either library; their shapes decide in the package."""
    product = importlib.import_module("fusedbayes.kernels.cpu.product")
    if request.param == "mm":
        yield
        return
    if not (onednn := product._onednn()):
        pytest.skip("torch has no oneDNN here, or no MKL")
    if request.node.callspec.params["dtype"] != torch.float32:
        pytest.skip("torch.mm is oneDNN's for 16 bits")
    spy = Mock(wraps=onednn)
    monkeypatch.setattr(product, "_onednn", lambda: spy)
    monkeypatch.setattr(product, "_ONEDNN_SIZES", (1, (1, 1), range(1, 100)))
    yield
    assert spy.called

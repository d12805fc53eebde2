"""Which implementation computes: the CPU kernel, Triton or PyTorch, and what is said of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import make_problem
from torch import Tensor

import fusedbayes as fb
from fusedbayes.kernels.cpu import native
from fusedbayes.ops import eager

ops = torch.ops.fusedbayes
ROOT = Path(__file__).parent.parent
built = pytest.mark.skipif(isinstance(native.load(), str), reason="no CPU kernel")


def is_reference(results: tuple[Tensor, ...]) -> bool:
    """Whether these are the very bits that PyTorch computes for `make_problem((5, 18, 20))` with the seed 0."""
    torch.manual_seed(0)
    expected = eager.bayes_linear(*make_problem((5, 18, 20)).forward)
    return all(torch.equal(actual, exact) for actual, exact in zip(results, expected, strict=True))


def run() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return ops.bayes_linear(*make_problem((5, 18, 20)).forward)


@built
def test_the_cpu_kernel_is_used_and_said_to_be() -> None:
    backend = fb.backend_info()["cpu"]
    assert backend.name == "native"
    assert any(name in backend.reason for name in native.INSTRUCTION_SETS)
    assert not is_reference(run())


def test_use_reference() -> None:
    with fb.use_reference():
        with pytest.raises(ZeroDivisionError), fb.use_reference():
            raise ZeroDivisionError
        assert is_reference(run())  # still, after the inner one
        assert {backend.name for backend in fb.backend_info().values()} == {"reference"}
    assert is_reference(run()) == (fb.backend_info()["cpu"].name == "reference")


def test_what_was_not_built_is_replaced_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FOLDER", Path("/nowhere"))
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    assert fb.backend_info()["cpu"].name == "reference"
    assert "C++ compiler" in fb.backend_info()["cpu"].reason
    assert is_reference(run())


def test_what_is_built_is_built_of_these_sources() -> None:
    """Else the kernel's tests would be skipped without a word: pip install -e . builds it again."""
    if (native.FOLDER / native.LIBRARY).exists():
        assert isinstance(native.load(), native.Library), native.load()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
def test_a_build_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One from before any other function: nothing else of it may be needed to know."""
    source = tmp_path / "old.c"
    source.write_text("unsigned fusedbayes_source_hash(void) { return 12345; }")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / native.LIBRARY], check=True)
    for name in native.SOURCES:
        shutil.copy(native.FOLDER / name, tmp_path)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert "other sources" in native.load.__wrapped__()


@built
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_to_pytorch(dtype: torch.dtype) -> None:
    problem = make_problem((5, 18, 20), dtype=dtype, parameter_dtype=dtype)
    for actual, expected in zip(ops.bayes_linear(*problem.forward), eager.bayes_linear(*problem.forward), strict=True):
        assert torch.equal(actual, expected)


@built
def test_a_tensor_subclass_is_served() -> None:
    class Labelled(Tensor):
        pass

    torch.manual_seed(0)
    problem = make_problem((5, 18, 20))
    y, *_ = ops.bayes_linear(*problem._replace(x=problem.x.as_subclass(Labelled)).forward)
    assert torch.equal(y, ops.bayes_linear(*problem.forward)[0])


def test_the_profiler_sees_operators() -> None:
    layer = fb.BayesLinear(4, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        layer(torch.randn(5, 4, requires_grad=True)).sum().backward()
    seen = {event.key for event in profile.key_averages()}
    assert {"fusedbayes::bayes_linear", "fusedbayes::bayes_linear_backward"} <= seen


def test_tensors_that_are_not_what_is_stored() -> None:
    """A view that is to be negated, and a zero without memory: the dispatcher makes numbers of them first."""
    layer, x = fb.BayesLinear(4, 3), torch.randn(5, 4)
    for unusual in (torch._neg_view(x), torch._efficientzerotensor(5, 4)):
        with fb.frozen_sample(layer, seed=1):
            torch.testing.assert_close(layer(unusual), layer(unusual.clone()))


def test_cuda_is_explained() -> None:
    backend = fb.backend_info()["cuda"]
    assert backend.name == ("triton" if torch.cuda.is_available() else "reference")
    assert backend.reason


def test_importing_and_using_the_package_on_a_cpu_does_not_import_triton() -> None:
    code = "import sys, torch, fusedbayes as fb; fb.BayesLinear(3, 2)(torch.ones(1, 3)); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_installation_succeeds_without_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="what pyproject.toml asks for")
    environment = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob(native.LIBRARY))


def test_importing_within_another_default_device() -> None:
    """Deferred initialisation: what an ordinary CPU tensor is must not be read off the default device."""
    program = """
import torch
with torch.device("meta"):
    import fusedbayes as fb
    layer = fb.BayesLinear(4, 3)
assert layer(torch.empty(2, 4, device="meta")).is_meta
assert fb.BayesLinear(4, 3)(torch.ones(2, 4)).isfinite().all()
"""
    subprocess.run([sys.executable, "-c", program], check=True)

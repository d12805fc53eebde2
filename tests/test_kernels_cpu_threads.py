"""The CPU kernel and threads: its own, the user's, and layers that run while another one computes."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import make_problem
from torch import Tensor

from fusedbayes.kernels import cpu
from fusedbayes.kernels.cpu import native
from fusedbayes.noise import Address

ops = torch.ops.fusedbayes

LIBRARY = native.load()
pytestmark = [
    pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no CPU kernel: {LIBRARY}"),
    pytest.mark.usefixtures("fresh_workspace"),
]


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 77, 1091), (1, 2000, 27)], ids=["long rows", "short rows"])
@pytest.mark.parametrize("parallel", [True, False], ids=["openmp", "own-threads"])
def test_every_number_of_threads_gives_the_same_bits(
    parallel: bool, shape: tuple[int, int, int], threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several chunks of work, the last one smaller."""
    if not parallel:
        monkeypatch.setattr(native, "load", lambda: replace(LIBRARY, parallel=None))
    problem = make_problem(shape)
    wide = make_problem((20, 2100, 3))  # of whose bias several threads add up dY
    results = []
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        grads = ops.sample_weight_backward(problem.weight[0], problem.grad_kl, *problem.weight, *problem.noise)
        _, *of_layer = ops.bayes_linear_backward(*wide.backward)
        results.append((*ops.sample_weight(*problem.sample_weight(torch.float32)), *grads, *of_layer))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_no_thread_is_started_anew(threads: None) -> None:
    """Torch's threads are used as they are: a team of another size would have the runtime end some and start others."""
    torch.set_num_threads(4)
    few_chunks, many = make_problem((1, 40, 1000)), torch.randn(1 << 20)
    seen = set()
    for _ in range(5):
        ops.sample_weight(*few_chunks.sample_weight(torch.float32))
        many.exp()
        seen |= {path.name for path in Path("/proc/self/task").iterdir()}
    ops.sample_weight(*few_chunks.sample_weight(torch.float32))
    assert {path.name for path in Path("/proc/self/task").iterdir()} == seen


def test_threads_of_the_user_do_not_share_a_workspace(small_blocks: None) -> None:
    problems = [make_problem((3, 64, 64)) for _ in range(4)]
    expected = [ops.bayes_linear(*problem.forward)[0] for problem in problems]
    actual: list[Tensor | None] = [None] * len(problems)

    def work(index: int) -> None:
        for _ in range(20):
            actual[index] = ops.bayes_linear(*problems[index].forward)[0]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_threads_flush_denormals_if_the_caller_does(threads: None) -> None:
    torch.set_num_threads(4)
    mu, rho = torch.full((64, 4096), 1e-40), torch.full((64, 4096), -1e4)
    arguments = mu, rho, None, None, torch.tensor(1), None, Address(), torch.float32, False
    ops.sample_weight(*arguments)
    if not torch.set_flush_denormal(True):
        pytest.skip("not on this processor")
    try:
        first, *others = (ops.sample_weight(*arguments)[0] for _ in range(20))
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(first, other) for other in others)


def test_a_layer_within_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal handler or a finalizer may run one, between any two steps of another one."""
    problem, addmm = make_problem((4, 6, 8)), torch.addmm
    outer, inner = problem.forward, problem._replace(seed=problem.seed + 1).forward
    expected = cpu.bayes_linear(*outer)[0]

    def interrupted(*arguments: Any, **options: Any) -> Tensor:
        monkeypatch.setattr(torch, "addmm", addmm)
        cpu.bayes_linear(*inner)
        return addmm(*arguments, **options)

    monkeypatch.setattr(torch, "addmm", interrupted)
    assert torch.equal(cpu.bayes_linear(*outer)[0], expected)

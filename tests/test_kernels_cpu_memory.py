"""Memory of large results, which the CPU kernel keeps for the next ones."""

import itertools
import math
import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fusedbayes.kernels.cpu import native
from fusedbayes.noise import Address

LIBRARY = native.load()
PROC = Path("/proc/self")
pytestmark = [
    pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no CPU kernel: {LIBRARY}"),
    pytest.mark.skipif(not (PROC / "smaps_rollup").exists(), reason="memory is kept on Linux"),
]
MIB = 1 << 20


def result(mib: int) -> Tensor:
    """Memory that nobody has touched yet."""
    return native.library().new_result(torch.empty(1).expand(mib * MIB // 4))


@pytest.fixture
def unpoisoned() -> None:
    """Memory is not filled with NaN, as in the other tests."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_memory_of_the_last_step(dtype: torch.dtype) -> None:
    mu, rho, grad = (torch.randn(1025, 1024, dtype=dtype) for _ in range(3))
    backward, key = torch.ops.fusedbayes.sample_weight_backward, (torch.tensor(1), None, Address())
    last = backward(grad, None, mu, rho, None, None, *key)
    places = {tensor.data_ptr() for tensor in last}
    del last
    grads = backward(grad, None, mu, rho, None, None, *key)
    assert {tensor.data_ptr() for tensor in grads} == places
    of_few_rows = backward(grad[:2], None, mu[:2], rho[:2], None, None, *key)
    for all_rows, few_rows in zip(grads, of_few_rows, strict=True):
        assert torch.equal(all_rows[:2], few_rows)
        assert all_rows.isfinite().all()
        assert all_rows.dtype == dtype
        assert all_rows.is_contiguous()


def test_what_is_not_written_is_nan_where_torch_fills_it() -> None:
    tensor = result(1).fill_(1.0)
    del tensor
    assert result(1).isnan().all()


def test_results_that_live_share_no_memory(unpoisoned: None) -> None:
    choose, living = random.Random(0), []
    for _ in range(2000):
        if len(living) == 12 or (living and choose.random() < 0.4):
            del living[choose.randrange(len(living))]
        living.append(result(choose.choice([1, 2, 3])))
        places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in living)
        assert all(place + size <= following for (place, size), (following, _) in itertools.pairwise(places))


def test_memory_that_is_kept_was_in_use_at_one_time(unpoisoned: None) -> None:
    total = 3072  # more than other tests take; nothing of it is touched

    def address_space() -> int:
        return int((PROC / "statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    before = address_space()
    in_use = [result(total // 3) for _ in range(3)]
    del in_use
    result(total // 6)  # takes the place of one of them, not of all
    assert address_space() - before > 0.7 * total * MIB
    for count in (3, 4, 6, 1):
        in_use = [result(total // count) for _ in range(count)]
        assert address_space() - before < 1.1 * total * MIB
        del in_use


def test_the_system_may_have_what_is_not_in_use(unpoisoned: None) -> None:
    def lent() -> int:
        lines = (PROC / "smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("LazyFree:"))

    in_use = [result(8).fill_(1.0) for _ in range(16)]
    before = lent()
    del in_use
    assert lent() - before >= 128 - 32  # MiB, of which 32 are kept


@pytest.mark.parametrize("is_taken_over", [True, False])
def test_an_interrupt_loses_no_memory_and_frees_none_twice(
    is_taken_over: bool, monkeypatch: pytest.MonkeyPatch, unpoisoned: None
) -> None:
    def interrupted(capsule: object) -> Tensor:
        if is_taken_over:
            from_dlpack(capsule)
        raise KeyboardInterrupt

    place = result(5).data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr(native, "from_dlpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            result(5)
    first, second = result(5), result(5)
    assert first.data_ptr() == place
    assert second.data_ptr() != place


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # which is what is tested: it has threads
def test_a_child_of_a_process_whose_threads_take_memory(unpoisoned: None) -> None:
    done = threading.Event()

    def take() -> None:
        while not done.is_set():
            result(random.randrange(1, 64))

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            if (child := os.fork()) == 0:
                signal.alarm(20)  # ends a child that waits for a lock which nobody holds any more
                result(2)[0] = math.pi
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        for thread in threads:
            thread.join()

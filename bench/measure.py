"""Timing, memory and the machine's ceilings."""

import gc
import importlib.metadata
import math
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

import fusedbayes
from bench.implementations import PEERS
from fusedbayes.kernels.cpu import native

Run = Callable[[], object]

# Rounds are chosen to spend this much time on an implementation on average, within these bounds. A GPU's runs are
# shorter and vary less.
SECONDS = {"cpu": 0.6, "cuda": 0.05}
MIN_ROUNDS, MAX_ROUNDS = 7, 100
# The longest head start that the host gets, in seconds.
LONGEST_LEAD = 10e-3


def time_interleaved(runs: Mapping[str, Run], device: str, seconds: float | None = None) -> dict[str, list[float]]:
    """Seconds of each run, in rounds of all of them in an order drawn afresh, equally many for each.

    So whatever disturbs the machine disturbs all alike, and nobody always comes after the same one.
    """
    for run in runs.values():
        run()
    once = _cuda_timers(runs) if device == "cuda" else {name: _host_timer(run) for name, run in runs.items()}
    first = sum(timed() for timed in once.values())
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(len(runs) * (seconds or SECONDS[device]) / first)))
    order, shuffle = list(runs), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                times[name].append(once[name]())
    finally:
        gc.enable()
    return times


def _host_timer(run: Run) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return once


def _cuda_timers(runs: Mapping[str, Run]) -> dict[str, Callable[[], float]]:
    """The device's own time of each run, by events, with a cold L2 cache.

    A kernel of 30 us takes less time than its launch: events recorded around it would time the host. So the device
    first spins for longer than the host needs to queue the run, and then works without waiting.
    """
    # Larger than the cache, so that writing it evicts what earlier runs left there.
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def between_events(run: Run) -> float:
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    cycles = 10_000_000
    cycles_per_second = cycles / between_events(lambda: torch.cuda._sleep(cycles))

    def timer(run: Run) -> Callable[[], float]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        lead = min(LONGEST_LEAD, 2 * (time.perf_counter() - begin))

        def once() -> float:
            flush.zero_()
            torch.cuda._sleep(int(lead * cycles_per_second))
            return between_events(run)

        return once

    return {name: timer(run) for name, run in runs.items()}


def peak_memory(run: Run, device: str) -> int:
    """Most bytes that the tensors of `run` hold at once beyond what was there before.

    Memory that an allocator or a library keeps for the next ones does not count.
    """
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    profile = torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True)
    # The profiler sees what torch allocates, and no result in memory that fusedbayes kept.
    with patch.object(native, "LARGE", math.inf), profile:
        run()
    # The raw trace: the profiler's own summary folds most allocations into the operators that made them.
    trace = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in trace if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def bytes_kept_for_backward(forward: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes of the storages that the graph of `forward`'s result keeps, but for those of the `known` tensors."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return kept


def ceilings(device: str) -> dict[str, float]:
    """What the machine can do: bytes per second of a large copy, read and written, and FLOP per second of products."""
    on_gpu = device == "cuda"
    source = torch.ones(2**28 if on_gpu else 2**25, device=device)
    target = torch.empty_like(source)
    width = 8192 if on_gpu else 1536
    operands = {
        "fp32": torch.randn(width, width, device=device),
        "bf16": torch.randn(width, width, device=device, dtype=torch.bfloat16),
    }
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source)}
    runs |= {name: (lambda matrix=matrix: matrix @ matrix) for name, matrix in operands.items()}
    seconds = {name: statistics.median(rounds) for name, rounds in time_interleaved(runs, device).items()}
    rates = {f"flop_per_s_{name}": 2 * width**3 / seconds[name] for name in operands}
    return {"bytes_per_s": 2 * source.nbytes / seconds["copy"], **rates}


def environment(device: str) -> dict[str, Any]:
    """Device, versions, date and commit, for every record."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
        "fusedbayes": fusedbayes.__version__,
        "backend": fusedbayes.backend_info()[device].reason,
        "peers": {package: _version(package) for package in PEERS},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    """The installed version, if there is one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def device_name(device: str) -> str:
    """The processor's or the GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"

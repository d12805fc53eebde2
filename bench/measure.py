"""Timing, memory and the machine's ceilings."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

Run = Callable[[], object]

# Rounds are added until this much time is spent on an implementation, within these bounds.
SECONDS = 0.6
MIN_ROUNDS, MAX_ROUNDS = 5, 100


def time_interleaved(runs: Mapping[str, Run], device: str, seconds: float = SECONDS) -> dict[str, list[float]]:
    """Seconds of each run, one round of all after another, so that whatever disturbs the machine disturbs all alike.

    On CUDA each round is timed by events, after a pass over a buffer larger than the L2 cache.
    """
    once = _cuda_timer() if device == "cuda" else _host_timer
    for run in runs.values():
        for _ in range(2):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    while any(_wants_more(rounds, seconds) for rounds in times.values()):
        for name, run in runs.items():
            if _wants_more(times[name], seconds):
                times[name].append(once(run))
    return times


def _wants_more(rounds: list[float], seconds: float) -> bool:
    return len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and sum(rounds) < seconds)


def _host_timer(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_timer() -> Callable[[Run], float]:
    properties = torch.cuda.get_device_properties(0)
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device="cuda")

    def once(run: Run) -> float:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return once


def peak_memory(run: Run, device: str) -> int:
    """Most bytes that `run` holds at once beyond what was there before."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
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
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
    }


def device_name(device: str) -> str:
    """The processor's or the GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"

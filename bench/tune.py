"""Candidate search: the fastest configuration of each matrix kernel for named shapes, on a CUDA GPU.

    python -m bench.tune --out FILE

Each candidate's result is compared with the current configuration's before it is timed, since all of them draw the same
weights. FILE gets all times; the table printed names the best and what `select_config` takes today.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import device_name, time_interleaved
from fusedbayes import kernels
from fusedbayes.kernels import MatmulConfig, select_config

DTYPE = torch.bfloat16
SHAPES = [(rows, 4096, 4096) for rows in (1, 16, 64, 256, 1024, 4096)]
KERNELS = ("forward", "backward_input", "backward_weight")
Launch = Callable[[MatmulConfig], tuple[Tensor, ...]]
WITHIN_NOISE = 1.02  # a candidate has to be faster by this factor to be called better


def candidate_configs(kernel: str, rows: int) -> list[MatmulConfig]:
    """Tiles, warps and stages that are worth a try for a batch of `rows`."""
    # More rows than twice the batch would be padding; in dmu/drho they are only the length of a step.
    block_ms = (32, 64) if kernel == "backward_weight" else [m for m in (16, 32, 64, 128) if m <= max(16, 2 * rows)]
    tiles = itertools.product(block_ms, (32, 64, 128), (32, 64), (4, 8), (2, 3, 4))
    candidates = [MatmulConfig(m, n, k, warps, stages) for m, n, k, warps, stages in tiles if n * k <= 64 * 64]
    if kernel != "backward_weight":
        candidates.append(dataclasses.replace(candidates[0], single_pass=False))
    return candidates


def launcher(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Launch:
    """Runs `kernel` on random operands in a given configuration."""
    M, N, K = shape
    x, grad_y = torch.randn(M, K, device=device, dtype=dtype), torch.randn(M, N, device=device, dtype=dtype)
    mu, rho = torch.randn(N, K, device=device) / K**0.5, torch.full((N, K), -5.0, device=device)
    prior = torch.zeros((), device=device), torch.full((), K**-0.5, device=device)
    noise = torch.tensor(7, device=device), None, (0, 0, 0)
    no_bias = (None,) * 4
    grad_kl = torch.ones((), device=device)

    def run(config: MatmulConfig) -> tuple[Tensor, ...]:
        if kernel == "forward":
            return kernels.bayes_linear(x, mu, rho, *prior, *no_bias, *noise, (1, 0, 0), True, config=config)
        if kernel == "backward_input":
            return (kernels.bayes_linear_backward_input(grad_y, mu, rho, *noise, config=config),)
        return kernels.bayes_linear_backward_weight(
            grad_y, grad_kl, x, mu, rho, *prior, *no_bias, *noise, (1, 0, 0), config=config
        )[:2]

    return run


def search(
    kernel: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    current: MatmulConfig,
    candidates: Iterable[MatmulConfig],
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """`current` and every candidate that runs and is right, with their median times, the fastest first."""
    run = launcher(kernel, shape, dtype, device)
    expected = run(current)
    valid = {}
    for config in dict.fromkeys([current, *candidates]):
        try:
            actual = run(config)
        except Exception as error:  # too much shared memory, say: not a candidate here
            print(f"  left out {config}: {type(error).__name__}")
            continue
        errors = [((a - e).float().norm() / e.float().norm()).item() for a, e in zip(actual, expected, strict=True)]
        if all(error < 1e-2 for error in errors):  # the same weights, rounded to 16 bits, added up in another order
            valid[config] = lambda config=config: run(config)
        else:
            print(f"  WRONG {config}: off by {errors}")
    times = time_interleaved(valid, device, seconds=0.02)
    rows = [
        {"config": dataclasses.asdict(config), "median_s": statistics.median(rounds), "current": config == current}
        for config, rounds in times.items()
    ]
    return sorted(rows, key=lambda row: row["median_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no shape later than this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the candidate search needs a CUDA GPU")
    results: list[dict[str, Any]] = []
    end = time.monotonic() + arguments.seconds
    # By shape: when time runs out, the shapes that were reached have all their kernels.
    for shape, kernel in itertools.product(SHAPES, KERNELS):
        if time.monotonic() > end:
            print(f"out of time before {kernel} {shape}")
            break
        current = select_config(kernel, shape, DTYPE, torch.cuda.get_device_capability())
        rows = search(kernel, shape, DTYPE, current, candidate_configs(kernel, shape[0]))
        problem = {"device": device_name("cuda"), "kernel": kernel, "shape": shape, "dtype": str(DTYPE)}
        results.append(problem | {"candidates": rows})
        # Written after each shape: an interruption loses one of them.
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        now, best = next(row for row in rows if row["current"]), rows[0]
        gain = now["median_s"] / best["median_s"]
        verdict = f"{gain:.2f} times faster: {best['config']}" if gain > WITHIN_NOISE else "the current one is best"
        print(f"{kernel} {shape} {DTYPE}: {now['median_s'] * 1e6:.1f} us now, {verdict}", flush=True)


if __name__ == "__main__":
    main()

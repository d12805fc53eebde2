"""Candidate search: the fastest configuration of each matrix kernel for batches of many sizes, on a CUDA GPU.

    python -m bench.tune --out FILE [--write]

Each candidate's result is compared with the current configuration's before it is timed, since all of them draw the same
weights. FILE gets all times; what is printed names the best and what `select_config` takes today. With --write the best
ones become the device's entries in kernels/table.py.
"""

import argparse
import dataclasses
import inspect
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.budgets import SHARED_MEMORY
from bench.measure import device_name, environment, time_interleaved
from fusedbayes import kernels
from fusedbayes.kernels import MatmulConfig, select_config, table
from fusedbayes.kernels.select import SAMPLE_ONCE

DTYPE = torch.bfloat16
MOST_SHARED = SHARED_MEMORY[90]
WIDTH = 4096
ROWS = (16, 32, 64, 128, 256, 512, 1024, 4096)
KERNELS = ("forward", "backward_input", "backward_weight")
Launch = Callable[[MatmulConfig], tuple[Tensor, ...]]
# By warps: of eight a multiprocessor has one program, so that more of it is loaded ahead, and half as many splits fill
# the device.
STAGES_AND_SPLITS = {4: ((2, 3), (2, 4)), 8: ((3, 4), (1, 2))}
WITHIN_NOISE = 1.02  # a candidate has to be faster by this factor to be called better


def candidate_configs(kernel: str, rows: int) -> list[MatmulConfig]:
    """Tiles, warps, stages and splits that are worth a try for a batch of `rows`."""
    if kernel == "backward_weight":
        tiles = ((128, 128, 8), (64, 128, 4), (128, 64, 4))
        return [
            *(
                MatmulConfig(m, n, k, warps, stages, max_registers=registers)
                for n, k, warps in tiles
                for m in (32, 64)
                for stages in (3, 4)
                for registers in ((None, 128) if warps == 8 else (None,))
            ),
            SAMPLE_ONCE,
        ]
    # More rows than the batch would be padding; more tiles of rows draw the weights again.
    block_ms = [m for m in (rows // 2, rows) if 16 <= m <= 256] or [256]
    tiles = [(64, 64, 4, 1), (64, 32, 4, 2), (128, 32, 8, 1), (64, 128, 4, 1)]
    if kernel == "forward" and rows >= 64:
        tiles += [(64, 64, 8, 1), (64, 128, 8, 1), (32, 128, 8, 1)]
    candidates = [
        MatmulConfig(m, n, k, warps, stages, unroll, splits)
        for m in block_ms
        for n, k, warps, unroll in tiles
        for stages, splits in itertools.product(*STAGES_AND_SPLITS[warps])
        # With fewer than 64 rows x is not the first operand: then W is, and has 64 of them.
        if m * n <= 256 * 64 and (m >= 64 or n >= 64 or warps == 4) and _shared_memory(m, n, k, stages) <= MOST_SHARED
    ]
    return [*candidates, SAMPLE_ONCE]


def _shared_memory(m: int, n: int, k: int, stages: int) -> int:
    """Bytes of a forward program of 8 warps: mu, rho and x of the stages that are loaded ahead, and W."""
    return (stages - 1) * (2 * 4 * n * k + 2 * m * k) + 2 * n * k


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
            return kernels.bayes_linear(
                x, mu, rho, *prior, *no_bias, *noise, (1, 0, 0), 1, False, "shared", True, config=config
            )[:2]
        of_x = kernel == "backward_input"
        how = 1, "shared", of_x, not of_x
        slope = grad_y.new_empty(0)
        grads = kernels.bayes_linear_backward(
            grad_y, grad_kl, slope, x, mu, rho, *prior, *no_bias, *noise, (1, 0, 0), *how, config=config
        )
        return grads[:1] if of_x else grads[1:3]

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


def best_batches(results: Iterable[tuple[int, MatmulConfig]]) -> dict[int, MatmulConfig]:
    """The table's entry of (rows, best configuration) pairs: up to the batch where sampling once has overtaken.

    Where it never has, the last holds for any batch. Neighbours with one configuration become one row; splits are left
    to `select_config`, which knows the layer.
    """
    batches: dict[int, MatmulConfig] = {}
    for rows, config in sorted(results):
        if not config.single_pass:
            return batches
        config = dataclasses.replace(config, splits=1)
        if batches and batches[last := max(batches)] == config:
            del batches[last]
        batches[rows] = config
    batches[table.ANY] = batches.pop(max(batches))
    return batches


def render(measured: Mapping[Any, str], entries: Mapping[Any, Mapping[int, MatmulConfig]]) -> str:
    """The text of kernels/table.py with these entries."""
    source = inspect.getsource(table)
    lines = [source[: source.index("MEASURED: dict")].rstrip(), ""]
    lines += _assignment(
        "MEASURED: dict[tuple[Kernel, str, int], str]", [f"{_key(k)}: {v!r}" for k, v in measured.items()]
    )
    blocks = []
    for key, batches in entries.items():
        rows = [f"        {'ANY' if r == table.ANY else r}: {_value(config)}," for r, config in batches.items()]
        blocks.append("\n".join([f"{_key(key)}: {{", *rows, "    }"]))
    lines += ["", *_assignment("TABLE: dict[tuple[Kernel, str, int], dict[int, MatmulConfig]]", blocks)]
    return "\n".join(lines).replace("'", '"') + "\n"


def _assignment(name: str, items: list[str]) -> list[str]:
    return [f"{name} = {{", *(f"    {item}," for item in items), "}"] if items else [f"{name} = {{}}"]


def _key(key: tuple[str, str, int]) -> str:
    kernel, arithmetic, capability = key
    return f'("{kernel}", "{arithmetic}", {capability})'


def _value(config: MatmulConfig) -> str:
    blocks = ", ".join(str(block) for block in (config.block_m, config.block_n, config.block_k))
    fields = [f for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING]
    others = [f", {f.name}={getattr(config, f.name)}" for f in fields if getattr(config, f.name) != f.default]
    return f"MatmulConfig({blocks}{''.join(others)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no batch later than this")
    parser.add_argument("--write", action="store_true", help="rewrite kernels/table.py, of kernels that were finished")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the candidate search needs a CUDA GPU")
    capability = torch.cuda.get_device_capability()
    results: list[dict[str, Any]] = []
    best: dict[str, list[tuple[int, MatmulConfig]]] = {kernel: [] for kernel in KERNELS}
    end = time.monotonic() + arguments.seconds
    for rows, kernel in itertools.product(ROWS, KERNELS):
        if time.monotonic() > end:
            print(f"out of time before {kernel} with {rows} rows")
            break
        shape = (rows, WIDTH, WIDTH)
        current = select_config(kernel, shape, DTYPE, capability)
        found = search(kernel, shape, DTYPE, current, candidate_configs(kernel, rows))
        problem = {"device": device_name("cuda"), "kernel": kernel, "shape": shape, "dtype": str(DTYPE)}
        results.append(problem | {"candidates": found})
        # Written after each search: an interruption loses one of them.
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        now = next(row for row in found if row["current"])
        gain = now["median_s"] / found[0]["median_s"]
        best[kernel].append((rows, MatmulConfig(**(found[0] if gain > WITHIN_NOISE else now)["config"])))
        verdict = f"{gain:.2f} times faster: {found[0]['config']}" if gain > WITHIN_NOISE else "the current one is best"
        print(f"{kernel} {shape} {DTYPE}: {now['median_s'] * 1e6:.1f} us now, {verdict}", flush=True)
    if arguments.write:
        versions = environment("cuda")
        measured, entries = dict(table.MEASURED), {key: dict(batches) for key, batches in table.TABLE.items()}
        for kernel, batches in best.items():
            if len(batches) == len(ROWS):
                key = (kernel, "16-bit", 10 * capability[0] + capability[1])
                measured[key] = "{device}, {date}, triton {triton}".format(**versions)
                entries[key] = best_batches(batches)
        Path(inspect.getfile(table)).write_text(render(measured, entries))


if __name__ == "__main__":
    main()

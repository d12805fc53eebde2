"""The throughput suite: each case for each implementation that is installed, fusedbayes's rivals first of all.

All implementations of a case are timed together, in turns, when the first of them is asked for; pytest-benchmark then
gets the times that were taken. ``pytest bench`` runs the quick cases, ``pytest bench --full`` all of them.
"""

import functools
import itertools
import json
import statistics
from typing import Any

import pytest
import torch

from bench.cases import GROUPS, Case, full_cases, quick_cases
from bench.implementations import BASELINE, REFERENCE, implementations
from bench.measure import bytes_kept_for_backward, ceilings, environment, peak_memory, time_interleaved
from bench.models import Model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Recorded:
    """A clock that replays durations: it ticks once before and once after each round."""

    def __init__(self) -> None:
        self.ticks: Any = iter(())

    def load(self, durations: list[float]) -> None:
        edges = itertools.accumulate(durations, initial=0.0)
        self.ticks = itertools.chain.from_iterable(itertools.pairwise(edges))

    def __call__(self) -> float:
        return next(self.ticks)


clock = Recorded()


@functools.cache
def machine() -> dict[str, Any]:
    return environment(DEVICE) | ceilings(DEVICE)


@functools.lru_cache(maxsize=1)
def measurements(case: Case) -> dict[str, dict[str, Any] | str]:
    """For each implementation its times and memory, or what was wrong with its answer."""
    results: dict[str, dict[str, Any] | str] = {}
    models: dict[str, Model] = {}
    # What was compiled for other shapes would have this one compiled for any shape.
    torch._dynamo.reset()
    standards = [Model(implementations()[name], case, DEVICE) for name in (BASELINE, REFERENCE)]
    for name, implementation in implementations().items():
        torch.manual_seed(0)
        try:
            model = Model(implementation, case, DEVICE)
            model.check(*standards)
            model.run()
        except Exception as error:  # whatever another library raises, the others get their numbers
            results[name] = f"{type(error).__name__}: {error}"
            continue
        models[name] = model
    del standards
    times = time_interleaved({name: model.run for name, model in models.items()}, DEVICE)
    for name, model in models.items():
        known = [model.x, *model.network.parameters(), *model.network.buffers()]
        results[name] = {
            "times": times[name],
            "peak_bytes": peak_memory(model.run, DEVICE),
            "kept_bytes": bytes_kept_for_backward(lambda model=model: model.loss()[0], known) if case.trains else 0,
        }
    return results


def record(case: Case, name: str, result: dict[str, Any]) -> dict[str, Any]:
    """One row of the results: what was measured beside what the machine allows."""
    seconds = statistics.median(result["times"])
    bandwidth, rate = machine()["bytes_per_s"], machine()[f"flop_per_s_{case.precision}"]
    floor = max(case.bytes / bandwidth, case.flop / rate)
    bayesian = name != BASELINE  # the bytes are those of a Bayesian layer
    return {
        "group": case.group,
        "case": case.name,
        "network": case.network.name,
        "rows": case.rows,
        "samples": case.samples,
        "precision": case.precision,
        "implementation": name,
        "median_s": seconds,
        "quartiles_s": statistics.quantiles(result["times"], n=4),
        "flop": case.flop,
        "bytes": case.bytes,
        "share_of_floor": floor / seconds if bayesian else None,
        "share_of_bandwidth": case.bytes / seconds / bandwidth if bayesian else None,
        "share_of_matmul_rate": case.flop / seconds / rate,
        "peak_bytes": result["peak_bytes"],
        "kept_bytes": result["kept_bytes"],
        **machine(),
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = quick_cases()
    if metafunc.config.getoption("full"):
        cases = full_cases(8192 if DEVICE == "cuda" else 4096)
    names = list(implementations())
    parameters = [pytest.param(case, name, id=f"{case.group}: {case.name}: {name}") for case in cases for name in names]
    metafunc.parametrize(("case", "name"), parameters)


@pytest.mark.benchmark(timer=clock)
def test_throughput(benchmark: Any, request: pytest.FixtureRequest, case: Case, name: str) -> None:
    assert case.group in GROUPS
    result = measurements(case)[name]
    assert isinstance(result, dict), f"no number for {name}: {result}"
    benchmark.group = f"{case.group}: {case.name}"
    row = record(case, name, result)
    benchmark.extra_info |= row
    if (path := request.config.getoption("records")) is not None:
        # At once: an interruption keeps what was measured.
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    clock.load(result["times"])
    benchmark.pedantic(lambda: None, rounds=len(result["times"]))

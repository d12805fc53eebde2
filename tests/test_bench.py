"""The benchmark's own rules: no number for a wrong answer, the work counted right, slowdowns found."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import compare, implementations, measure, report, tune
from bench.cases import Case, mlp, square
from bench.models import Model
from fusedbayes.kernels import MatmulConfig, select, table

CASE = Case("forward+backward", square(64), rows=40)


class TooLoud(implementations.CleanLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(x.shape[0], self.weight_mu.shape[0])


class Shifted(implementations.CleanLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01


class Averaged(implementations.CleanLinear):
    def _kl(self, mu: Tensor, rho: Tensor) -> Tensor:
        return super()._kl(mu, rho) / mu.numel()


def eager(kind: type[nn.Module]) -> implementations.Implementation:
    return implementations.Implementation("mine", kind, implementations.MU_RHO, kl=implementations._sum_of_layers)


def check(implementation: implementations.Implementation, case: Case = CASE) -> None:
    known = implementations.implementations()
    standards = [Model(known[name], case, "cpu") for name in (implementations.BASELINE, implementations.REFERENCE)]
    Model(implementation, case, "cpu").check(*standards)


@pytest.mark.parametrize("name", ["nn.Linear", "fusedbayes", "reference, eager"])
def test_right_answers_pass_the_check(name: str) -> None:
    check(implementations.implementations()[name])


@pytest.mark.parametrize(
    ("kind", "message"),
    [(TooLoud, "sigma -> 0"), (Shifted, "sigma -> 0"), (Averaged, "gradient")],
    ids=["loud", "shifted", "averaged"],
)
def test_a_wrong_answer_gives_no_number(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(eager(kind))


def test_missing_noise_is_found() -> None:
    class Quiet(implementations.CleanLinear):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return nn.functional.linear(x, self.weight_mu, self.bias_mu)

    for case in (CASE, Case("forward", mlp(64, 32, 16), rows=40)):
        with pytest.raises(AssertionError, match="variance is 0"):
            check(eager(Quiet), case)


def test_work_of_a_case() -> None:
    network = mlp(5, 7, 3)
    assert network.weights == 5 * 7 + 7 + 7 * 3 + 3
    forward = Case("forward", network, rows=11)
    assert forward.flop == 2 * 11 * (5 * 7 + 7 * 3)
    assert forward.bytes == 8 * network.weights + 4 * 11 * (5 + 7 + 7 + 3)
    # 32 bytes per weight with the backward pass: DESIGN's count for a small batch.
    assert Case("forward+backward", network, 11).bytes == 32 * network.weights + 3 * 4 * 11 * 22
    assert Case("prediction", network, 11, samples=4).flop == 4 * forward.flop


def test_kept_for_backward_and_peak() -> None:
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    kept = measure.bytes_kept_for_backward(lambda: ((x @ weight).sin() ** 2).sum(), [x, weight])
    assert kept == 2 * 64 * 64 * 4  # the product, for the sine, and the sine, for the square
    peak = measure.peak_memory(lambda: torch.ones(1000, 1000).add(1.0).sum(), "cpu")
    assert 8e6 <= peak < 8.1e6


def records(ours: float) -> list[dict[str, Any]]:
    times = {"nn.Linear": 1e-3, "torch.compile": 3e-3, "fusedbayes": ours}
    same: dict[str, Any] = {
        "group": "forward",
        "precision": "fp32",
        "network": "64 x 64",
        "share_of_floor": 0.5,
        "device": "d",
    }
    same |= {"peak_bytes": 2**20, "kept_bytes": 0, "torch": "t", "triton": "t", "date": "d", "commit": "c"}
    same |= {"bytes_per_s": 1e9, "flop_per_s_fp32": 1e9, "flop_per_s_bf16": 1e9}
    return [
        same | {"case": f"{rows} rows", "rows": rows, "implementation": name, "median_s": rows * time}
        for rows in (1, 2)
        for name, time in times.items()
    ]


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps(record) for record in records(1.5e-3)) + "\n")
    monkeypatch.setattr("sys.argv", ["report", str(lines), "--out", str(tmp_path / "out"), "--save", "kept"])
    report.main()
    printed = capsys.readouterr().out
    assert "|  | fusedbayes | 1.5 ms | 1.50 | 0.50 | 50.0% | 1.0 MiB | 0.0 MiB |" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "kept.json",
        "ratios-forward.png",
        "rows-forward-fp32.png",
    }
    assert report.load([tmp_path / "out" / "kept.json"]) == report.load([lines])


def test_compare_finds_what_got_slower() -> None:
    """Against nn.Linear of the same run: a machine that is slower altogether is no regression."""
    old = records(2e-3)
    assert compare.slower(old, [r | {"median_s": 3 * r["median_s"]} for r in old]) == []
    found = compare.slower(old, records(2.5e-3))
    assert [(case, name) for _, case, name, _ in found] == [("1 rows", "fusedbayes"), ("2 rows", "fusedbayes")]
    assert all(abs(factor - 1.25) < 1e-9 for *_, factor in found)
    lost = compare.missing(old, [r for r in old if r["rows"] == 1 and r["implementation"] != "fusedbayes"])
    assert lost == [("forward", "1 rows", "fusedbayes")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidate_search(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    current, other = MatmulConfig(16, 16, 16), MatmulConfig(16, 32, 16)
    rows = tune.search(kernel, (5, 17, 32), torch.float32, current, [other, current], device="cpu")
    assert sorted(row["current"] for row in rows) == [False, True]
    assert len(tune.candidate_configs(kernel, rows=4096)) == len(set(tune.candidate_configs(kernel, rows=4096)))


def test_the_search_writes_the_table_of_configurations() -> None:
    assert tune.render(table.MEASURED, table.TABLE) == Path(inspect.getfile(table)).read_text()
    one, other = MatmulConfig(16, 64, 64), MatmulConfig(64, 64, 64)
    found = [(16, one), (32, dataclasses.replace(one, splits=4)), (64, other), (128, select.SAMPLE_ONCE), (256, other)]
    assert tune.best_batches(found) == {32: one, 64: other}
    assert tune.best_batches(found[:3]) == {32: one, table.ANY: other}

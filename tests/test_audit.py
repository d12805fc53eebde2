"""The static audit: the kernels keep their budgets on every target, and what breaks one is found."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import audit, roofline, sass
from bench.budgets import FURTHER_SAMPLE, INSTRUCTIONS, SPECIAL, violations
from bench.facts import Facts, Variant

ROOT = Path(__file__).parent.parent


def facts(kernel: str = "_linear_forward_kernel", operands: str = "bf16", *traits: str, **changes: Any) -> Facts:
    """Of a made-up kernel within its budget."""
    within = Facts(
        Variant(kernel, 90, operands, "64 M x 64 N x 64 K, 4 warps, 2 stages", traits),
        draws=True,
        multiplies=kernel.startswith("_linear"),
        threads=128,
        registers=168,
        shared=56 * 1024,
        tensor_cores="HGMMA" if kernel.startswith("_linear") else "",
        weights=4096,
        instructions=INSTRUCTIONS[kernel],
        special=SPECIAL,
        ahead=1,
    )
    return dataclasses.replace(within, **changes)


def test_kernels_keep_their_budgets_on_every_target(tmp_path: Path) -> None:
    # In this process Triton may be interpreting.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-m", "bench.audit", "--json", str(tmp_path / "audit.json")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (tmp_path / "audit.json").exists(), run.stderr
    result = json.loads((tmp_path / "audit.json").read_text())
    assert result["violations"] == []
    assert run.returncode == 0, run.stderr
    compiled = {(kernel, capability) for kernel, capability, *_ in (f["variant"] for f in result["facts"])}
    assert {(name, target) for name in audit.kernel_names() for target in audit.TARGETS} <= compiled


@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_what_is_within_its_budget_is_not_reported(kernel: str) -> None:
    assert violations([facts(kernel)]) == []
    assert violations([facts(kernel, "ieee", tensor_cores="", instructions=100.0)]) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param({"error": "RuntimeError: no"}, "does not compile: RuntimeError: no", id="error"),
        pytest.param({"spills": 2}, "spills: 2 instructions, 0 bytes of stack; the budget is 0", id="spills"),
        pytest.param({"stack": 8}, "spills: 0 instructions, 8 bytes of stack; the budget is 0", id="stack"),
        pytest.param({"shared": 232449}, "232449 bytes of shared memory; the target has 232448", id="shared"),
        pytest.param({"tensor_cores": ""}, "no tensor-core instruction in the product's loop", id="no tensor cores"),
        pytest.param({"tensor_cores": "HMMA"}, "HMMA in the product's loop instead of HGMMA", id="old tensor cores"),
        pytest.param({"instructions": None}, "no sine where weights should be drawn", id="no sine"),
        pytest.param({"special": 1.0}, "1.00 special functions per weight; the noise alone takes 2", id="too few"),
        pytest.param({"special": 4.51}, "4.51 special functions per weight; the budget is 4.5", id="special"),
        pytest.param(
            {"further_sample": FURTHER_SAMPLE + 1},
            "23.00 instructions per weight of each further sample; the budget is 22",
            id="further sample",
        ),
    ],
)
def test_what_breaks_a_rule_is_reported(changes: dict[str, Any], sentence: str) -> None:
    (found,) = violations([facts(**changes)])
    assert found.startswith("_linear_forward_kernel on sm_90 (bf16, 64 M x 64 N x 64 K, 4 warps, 2 stages): ")
    assert sentence in found


@pytest.mark.parametrize(("kernel", "budget"), INSTRUCTIONS.items())
def test_each_budget_of_instructions_is_kept(kernel: str, budget: float) -> None:
    (found,) = violations([facts(kernel, "tf32", "KL", instructions=budget + 0.5)])
    assert f"{budget + 0.5:.2f} instructions per weight; the budget is {budget:g}" in found


def test_without_a_budget_spills_still_count() -> None:
    (found,) = violations([facts("_linear_forward_kernel", "ieee", tensor_cores="", instructions=100.0, spills=1)])
    assert "spills" in found


def test_a_kernel_that_was_not_compiled_or_has_no_budget_is_reported() -> None:
    assert violations([facts()], ["_linear_forward_kernel"]) == [
        f"_linear_forward_kernel was not compiled for sm_{target}" for target in (80, 100)
    ]
    unknown = dataclasses.replace(facts(), variant=facts().variant._replace(kernel="_new_kernel"))
    assert "no budget" in violations([unknown])[0]


def test_budgets_are_frozen() -> None:
    with pytest.raises(TypeError):
        INSTRUCTIONS["_linear_forward_kernel"] = 100.0  # type: ignore[index]


def program(*lines: str) -> sass.Flow:
    """The flow of a program whose lines are instructions, 16 bytes each."""
    return sass.Flow(list(sass._instructions("".join(f"/*{16 * i:04x}*/ {line} ;\n" for i, line in enumerate(lines)))))


def test_loops_and_ways_through_a_program() -> None:
    flow = program(
        "MOV R1, R2",
        "LDG.E R3, [R4]",  # 0x10: the first loop
        "MUFU.SIN R5, R3",
        "NOP",
        "@P0 BRA 0x10",
        "@P1 BRA 0x80",
        "MUFU.SIN R5, R3",  # the way with a mask
        "BRA 0x90",
        "MUFU.COS R5, R3",  # 0x80: the way without a sine
        "@P2 EXIT",  # 0x90
        "STG.E [R4], R5",
        "@P3 CALL.REL.NOINC 0xd0",  # 0xb0: the second loop, whose end ptxas wrote as a call
        "BRA 0xb0",
        "EXIT",
    )
    loops = {head: sass.count(flow.code(blocks)) for head, blocks in flow.loops.items()}
    assert sorted(loops.values()) == [sass.Counts(0, 2, 0), sass.Counts(2, 3, 1)]
    (first,) = (blocks for head, blocks in flow.loops.items() if loops[head].normals)
    assert flow.paths(flow.after(first)) == {0: sass.Counts(0, 3, 1), 2: sass.Counts(2, 4, 1)}


def test_a_subroutine_is_no_way_to_the_end() -> None:
    flow = program("MOV R2, 0x20", "CALL.REL.NOINC 0x40", "MUFU.SIN R1, R1", "EXIT", "BPT.TRAP", "RET.REL.NODEC R2 0x0")
    assert flow.paths({0}) == {2: sass.Counts(2, 4, 1)}


@pytest.mark.parametrize(
    ("changes", "programs"),
    [({}, 3), ({"registers": 255}, 2), ({"shared": 100 * 1024}, 2), ({"registers": 32, "shared": 0}, 16)],
    ids=["registers", "more registers", "shared memory", "warps"],
)
def test_programs_that_fit_on_a_multiprocessor(changes: dict[str, int], programs: int) -> None:
    assert roofline.resident(facts(**changes)) == programs


def test_tables_are_written_between_the_markers() -> None:
    begin, end = audit.MARKERS
    assert audit.rewrite(f"a\n{begin}\nold\n{end}\nb\n", "new\n") == f"a\n{begin}\nnew\n{end}\nb\n"
    with pytest.raises(ValueError, match="once"):
        audit.rewrite("a", "new")
    audit.rewrite(audit.DOCS.read_text(), "")

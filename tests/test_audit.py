"""The static audit: the kernels keep their budgets on every target, and what breaks one is found."""

import dataclasses
import json
import os
import subprocess
import sys
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl

from bench import audit, roofline, sass
from bench.budgets import (
    FURTHER_SAMPLE,
    IN_TURN_SAMPLE,
    INSTRUCTIONS,
    LEAST_SPECIAL,
    OF_ESTIMATOR,
    SPECIAL,
    SPECIAL_OF,
    violations,
)
from bench.facts import IN_TURN, Facts, Variant, _loop_around, further_sample
from bench.launches import KernelLaunch, Operation, _Recorder
from fusedbayes.kernels.parameter import gaussian
from fusedbayes.kernels.sums import Splits

ROOT = Path(__file__).parent.parent
EIGHT_SAMPLES = "_linear_forward_kernel", "bf16", "8 samples"


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


@pytest.mark.audit
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
        pytest.param({"instructions": None}, "no sine or exponential where weights should be drawn", id="no sine"),
        pytest.param({"special": 1.0}, "1.00 special functions per weight; the noise alone takes 2", id="too few"),
        pytest.param({"special": 4.51}, "4.51 special functions per weight; the budget is 4.5", id="special"),
        pytest.param(
            {"samples": 4}, "4.50 special functions per weight; the noise alone takes 8", id="too few for samples"
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


@pytest.mark.parametrize(("kernel", "budget"), SPECIAL_OF.items())
def test_each_budget_of_special_functions_is_kept(kernel: str, budget: float) -> None:
    assert violations([facts(kernel, "fp32", "KL", special=budget)]) == []
    (found,) = violations([facts(kernel, "fp32", "KL", special=budget + 0.5)])
    assert f"{budget + 0.5:.2f} special functions per weight; the budget is {budget:g}" in found


@pytest.mark.parametrize(("kernel", "estimator"), OF_ESTIMATOR)
@pytest.mark.parametrize("inputs", [0.25, 2.0])
def test_an_estimator_has_a_budget_of_its_own(kernel: str, estimator: str, inputs: float) -> None:
    budget = OF_ESTIMATOR[kernel, estimator][90]
    instructions = budget.instructions + inputs * budget.per_input
    within = facts(kernel, "bf16", estimator, instructions=instructions, special=budget.special, inputs=inputs)
    assert violations([within]) == []
    (found,) = violations([dataclasses.replace(within, instructions=instructions + 0.5)])
    assert f"{instructions + 0.5:.2f} instructions per weight; the budget is {instructions:g}" in found
    (found,) = violations([dataclasses.replace(within, special=budget.special + 1.0)])
    assert "special functions per weight; the budget is" in found


def test_further_samples_have_a_budget_each_and_together() -> None:
    one = facts()
    instructions, special = one.instructions + 7 * FURTHER_SAMPLE, SPECIAL + 7 * LEAST_SPECIAL
    eight = facts(*EIGHT_SAMPLES, samples=8, instructions=instructions, special=special)
    assert violations([one, eight]) == []
    (found,) = violations([dataclasses.replace(eight, instructions=instructions + 0.5)])
    assert f"{instructions + 0.5:.2f} instructions per weight; the budget is {instructions:g}" in found
    (found,) = violations([dataclasses.replace(eight, special=special + 0.5)])
    assert f"{special + 0.5:.2f} special functions per weight; the budget is {special:g}" in found
    # Of a program whose first sample is cheap.
    (found,) = violations([dataclasses.replace(one, instructions=one.instructions - 7), eight])
    assert "21.50 instructions per weight of each further sample; the budget is 20.5" in found


def test_a_further_sample_is_compared_with_one_sample_of_the_same_kernel() -> None:
    eight = facts(*EIGHT_SAMPLES, samples=8, instructions=150.0)
    others = [
        facts(instructions=38.0),
        facts(instructions=36.0),
        facts("_linear_forward_kernel", "bf16", "KL", instructions=10.0),
        facts("_linear_forward_kernel", "tf32", instructions=10.0),
        facts("_linear_backward_input_kernel", instructions=10.0),
        facts("_linear_forward_kernel", "bf16", instructions=None),
    ]
    assert further_sample(eight, [eight, *others]) == (150.0 - 36.0) / 7
    assert further_sample(eight, others[2:]) is None
    assert further_sample(others[0], others) is None


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
    loops = {head: sass.count(flow.code(blocks), sass.NORMALS) for head, blocks in flow.loops.items()}
    assert sorted(loops.values()) == [sass.Counts(0, 2, 0), sass.Counts(2, 3, 1)]
    (first,) = (blocks for head, blocks in flow.loops.items() if loops[head].marks)
    assert flow.paths(flow.after(first), sass.NORMALS) == {0: sass.Counts(0, 3, 1), 2: sass.Counts(2, 4, 1)}


def test_a_subroutine_is_no_way_to_the_end() -> None:
    flow = program("MOV R2, 0x20", "CALL.REL.NOINC 0x40", "MUFU.SIN R1, R1", "EXIT", "BPT.TRAP", "RET.REL.NODEC R2 0x0")
    assert flow.paths({0}, sass.NORMALS) == {2: sass.Counts(2, 4, 1)}


def test_weights_are_counted_by_the_normals_or_the_sigmas_that_they_take() -> None:
    flow = program("MUFU.SIN R1, R1", "MUFU.EX2 R2, R2", "MUFU.EX2 R3, R3", "MUFU.EX2 R4, R4", "EXIT")
    assert flow.paths({0}, sass.NORMALS) == {2: sass.Counts(2, 5, 4)}
    assert flow.paths({0}, sass.SIGMAS) == {3: sass.Counts(3, 5, 4)}


@pytest.mark.parametrize(
    ("changes", "programs"),
    [({}, 3), ({"registers": 255}, 2), ({"shared": 100 * 1024}, 2), ({"registers": 32, "shared": 0}, 16)],
    ids=["registers", "more registers", "shared memory", "warps"],
)
def test_programs_that_fit_on_a_multiprocessor(changes: dict[str, int], programs: int) -> None:
    assert roofline.resident(facts(**changes)) == programs


def test_an_operation_moves_what_it_reads_and_writes_once() -> None:
    x, weight, y = (torch.empty(shape, device="meta") for shape in ((8, 32), (16, 32), (8, 16)))
    recorder = _Recorder(90)
    with recorder, torch._C._AutoDispatchBelowAutograd():  # as within our operators
        torch.mm(x, weight.t(), out=y)
        weight.to(torch.bfloat16)
        weight.to(torch.float32)  # nothing to do
    product, conversion = recorder.launches
    assert product == Operation("mm", 4 * (8 * 32 + 16 * 32 + 8 * 16), 2 * 8 * 16 * 32)
    assert (conversion.bytes, conversion.flop) == ((4 + 2) * 16 * 32, 0)


def forward(num_samples: int, samples: int, estimator: str = "shared", rows: int = 64) -> KernelLaunch:
    """A launch of the forward product for a layer of 128 x 256, with a tile of 64 each way."""
    constants = {"SAMPLES": samples, "ESTIMATOR": estimator, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    function = SimpleNamespace(
        __name__="_linear_forward_kernel",
        params=[SimpleNamespace(name=name, is_constexpr=True) for name in constants],
    )
    weight = gaussian((torch.empty(128, 256), torch.empty(128, 256)))
    sizes = {"num_samples": num_samples, "M": rows, "N": 128, "K": 256, "weight": weight}
    return KernelLaunch(90, function, sizes | constants, {}, (2 * (num_samples // samples), 1, ceil(rows / 64)))


def work(launch: KernelLaunch) -> roofline._Work:
    """Of all programs together."""
    (each,) = roofline._phases(launch, facts(samples=launch.constants.get("SAMPLES", 1)))
    return roofline._Work(*(launch.programs * value for value in each))


def test_the_last_arrivals_add_up_what_the_others_have_stored() -> None:
    def tail(launch: KernelLaunch, **arguments: object) -> float:
        launch = launch._replace(arguments=launch.arguments | arguments)
        return roofline._last_arrivals(launch, facts())

    def parts(splits: int, elements: int, at_once: int = 1) -> Splits:
        return Splits(torch.empty(splits, 2, elements), torch.zeros(3, dtype=torch.int32), tl.constexpr(at_once))

    launch, latency, port = forward(1, 1), roofline.L2_LATENCY, roofline.L2_BANDWIDTH
    assert tail(launch) == 0.0
    assert tail(launch, kl=object()) == pytest.approx(3 * latency)
    # Its own part is in registers.
    assert tail(launch, splits=parts(2, 4096)) == pytest.approx(3 * latency + 4 * 4096 / port)
    assert tail(launch, splits=parts(4, 1000)) == pytest.approx(5 * latency + 3 * 4 * 1000 / port)
    assert tail(launch, splits=parts(4, 1000, at_once=3)) == pytest.approx(3 * latency + 3 * 4 * 1000 / port)


def test_samples_share_one_read_of_the_weights_and_tiles_of_rows_do_not() -> None:
    one, more, rows = work(forward(8, 8)), work(forward(32, 8)), work(forward(8, 8, rows=256))
    assert more.memory == pytest.approx(one.memory)
    assert rows.memory == pytest.approx(4 * one.memory)
    for four in (more, rows):
        assert (four.issue, four.special, four.matmul) == pytest.approx(
            (4 * one.issue, 4 * one.special, 4 * one.matmul)
        )


def backward(kernel: str, num_samples: int, estimator: str, **constants: Any) -> KernelLaunch:
    """A launch of a backward product for a layer of 128 x 256 and 64 rows for each sample."""
    constants |= {"ESTIMATOR": estimator, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    function = SimpleNamespace(
        __name__=kernel, params=[SimpleNamespace(name=name, is_constexpr=True) for name in constants]
    )
    grad_y, x = torch.empty(num_samples * 64, 128), torch.empty(num_samples * 64, 256)
    tensors = {"grad_y_ptr": grad_y, "second_grad_ptr": grad_y, "x_ptr": x, "second_x_ptr": x}
    weight = gaussian((torch.empty(128, 256), torch.empty(128, 256)))
    sizes = {"num_samples": num_samples, "M": 64, "N": 128, "K": 256, "weight": weight}
    programs = num_samples * 4 if kernel == "_linear_backward_input_kernel" else 8
    return KernelLaunch(90, function, sizes | tensors | constants, {}, (programs, 1, 1))


def test_each_sample_draws_and_multiplies_for_the_gradient_of_the_input() -> None:
    one, eight = (work(backward("_linear_backward_input_kernel", samples, "flipout")) for samples in (1, 8))
    assert (eight.issue, eight.special, eight.matmul) == pytest.approx((8 * one.issue, 8 * one.special, 8 * one.matmul))
    assert one.matmul == pytest.approx(2 * work(backward("_linear_backward_input_kernel", 1, "shared")).matmul)


def test_samples_in_turn_repeat_their_part_of_the_epilogue() -> None:
    costs = facts("_linear_backward_pair_kernel", repeated=(10.0, 2.0), product_loop=100)
    pair = (backward("_linear_backward_pair_kernel", samples, "shared", SAMPLES=samples > 1) for samples in (1, 5))
    (one_product, one), (product, epilogue) = (roofline._phases(launch, costs) for launch in pair)
    assert (product.issue, product.waiting) == pytest.approx((5 * one_product.issue, 5 * one_product.waiting))
    assert costs.instructions is not None
    assert epilogue.issue / one.issue == pytest.approx((costs.instructions + 4 * 10.0) / costs.instructions)
    assert epilogue.special / one.special == pytest.approx((SPECIAL + 4 * 2.0) / SPECIAL)


def test_a_tensor_in_two_arguments_is_read_once_and_an_unused_one_not_at_all() -> None:
    weights, activations = 2 * 4 * 128 * 256, 4 * 64 * (128 + 256)
    assert backward("_linear_backward_pair_kernel", 1, "shared").bytes == weights + activations
    assert backward("_linear_backward_input_kernel", 1, "shared").bytes == weights + 4 * 64 * 128


def test_local_needs_no_noise_to_have_costs() -> None:
    assert backward("_linear_backward_pair_kernel", 1, "local").draws
    assert not backward("_linear_backward_pair_kernel", 1, "shared").draws


def test_what_comes_again_with_each_sample_in_turn_has_a_budget() -> None:
    kernel, budget = "_linear_backward_pair_kernel", IN_TURN_SAMPLE[90]
    within = facts(kernel, "bf16", IN_TURN, repeated=(budget, 2.0))
    assert further_sample(within, []) == budget
    assert violations([within]) == []
    (found,) = violations([dataclasses.replace(within, repeated=(budget + 0.5, 2.0))])
    assert f"{budget + 0.5:.2f} instructions per weight of each further sample; the budget is {budget:g}" in found


def test_a_loop_around_another_is_the_next_larger_one() -> None:
    flow = program("NOP", "FADD R1, R1", "HMMA R2", "@P0 BRA 0x20", "MUFU.SIN R1, R1", "@P1 BRA 0x10", "EXIT")
    (inner,) = (blocks for blocks in flow.loops.values() if len(blocks) == 1)
    head, around = _loop_around(flow, inner)
    assert sass.count(flow.code(around), sass.NORMALS) == sass.Counts(2, 5, 1)
    assert flow.paths({head}, sass.NORMALS) == {2: sass.Counts(2, 6, 1)}


def test_every_sample_and_both_products_of_a_pair_multiply() -> None:
    one = work(forward(1, 1))
    assert work(forward(8, 8)).matmul == pytest.approx(8 * one.matmul)
    assert work(forward(1, 1, "local")).matmul == pytest.approx(2 * one.matmul)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [({}, "memory"), ({"flop": 10**12}, "matmul"), ({"instructions": 1e12}, "issue"), ({"special": 1e11}, "special")],
)
def test_an_operation_takes_as_long_as_the_slowest_of_what_it_does(changes: dict[str, float], limit: str) -> None:
    prediction = roofline.predict(Operation("sample", 10**8)._replace(**changes), {})
    assert prediction.limit.startswith(limit)
    assert (prediction.seconds > 1e-4) == bool(changes)


def test_tables_are_written_between_the_markers() -> None:
    begin, end = audit.MARKERS
    assert audit.rewrite(f"a\n{begin}\nold\n{end}\nb\n", "new\n") == f"a\n{begin}\nnew\n{end}\nb\n"
    with pytest.raises(ValueError, match="once"):
        audit.rewrite("a", "new")
    audit.rewrite(audit.DOCS.read_text(), "")

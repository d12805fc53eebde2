"""What the compiled code of a launch says about its speed: resources, tensor cores, instructions per weight."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bench import sass
from bench.launches import KernelLaunch

TILE = {"BLOCK_M": "M", "BLOCK_N": "N", "BLOCK_K": "K"}
# Their noise is drawn after the loop with the product, in that of every other matrix kernel.
EPILOGUES = ("_linear_backward_weight_kernel", "_linear_backward_pair_kernel")
IN_TURN = "samples in turn"  # the trait of a program that works on all Monte Carlo samples, one after another
SINGLE_PASS = "_linear_forward_kernel"  # which forms the second product's operands itself


class Variant(NamedTuple):
    """One version of a kernel.

    Attributes:
        capability: of the target, such as 90.
        operands: "bf16", "fp16", "tf32" or "ieee", which is fp32 without tensor cores; of a kernel without a product
            the dtype of the weights.
        tile: sizes of the tile, warps, stages.
        traits: what else changes the code.
    """

    kernel: str
    capability: int
    operands: str
    tile: str
    traits: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kernel} on sm_{self.capability} ({', '.join((self.operands, self.tile, *self.traits))})"


@dataclass(frozen=True)
class Facts:
    """Of one compiled variant.

    Attributes:
        error: why it did not compile; then there is nothing else.
        draws: whether it needs noise.
        multiplies: whether it has a matrix product.
        threads: of a program.
        registers: of a thread. spills: instructions that move registers to local memory and back; stack: bytes of it.
        shared: bytes of shared memory of a program.
        tensor_cores: the instruction of the loop with the product, if there is one.
        samples: Monte Carlo samples that a program draws of each weight that it reads.
        inputs: elements of x that it squares or gives random signs, for each weight.
        weights: that a program reads in one iteration of its main loop, or in its epilogue.
        instructions, special: instructions and results of the special-function unit for each of them, all its samples
            together, but only one of those that it takes in turn. None if it draws nothing.
        repeated: what of both comes again with each further sample, where a program takes them in turn.
        product_loop: instructions that a thread has for one step of the product, where that is a loop of its own.
        ahead: steps that are loaded ahead, while earlier ones are worked on. 0 if loads stop the thread.
    """

    variant: Variant
    error: str = ""
    draws: bool = False
    multiplies: bool = False
    threads: int = 0
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_cores: str = ""
    samples: int = 1
    inputs: float = 0.0
    weights: int = 0
    instructions: float | None = None
    special: float | None = None
    repeated: tuple[float, float] = (0.0, 0.0)
    product_loop: int = 0
    ahead: int = 0


def variant(launch: KernelLaunch) -> Variant:
    """Which version of its kernel a launch needs."""
    constants, arguments = launch.constants, launch.arguments
    if "DOT_DTYPE" in constants:
        name = str(constants["DOT_DTYPE"])
        operands = constants["INPUT_PRECISION"] if name == "fp32" else name
    else:
        names = ("sampled_ptr", "grad_weight_ptr", "out_ptr", "y_ptr", "second_x_ptr")
        sampled = (arguments.get(name) for name in names)
        operands = next((_dtype(tensor) for tensor in sampled if tensor is not None), "fp32")
    tile = " x ".join(f"{constants[name]} {letter}" for name, letter in TILE.items() if name in constants)
    if constants.get("UNROLL", 1) > 1:
        tile += f", unrolled {constants['UNROLL']} times"
    tile += "".join(
        f", {launch.options[name]} {name[4:]}" for name in ("num_warps", "num_stages") if name in launch.options
    )
    with_kl = any(arguments.get(name) is not None for name in ("kl", "grad_kl_ptr"))
    weight = arguments.get("weight")
    parameters = "fp32" if weight is None else _dtype(weight.mu)
    estimator, samples = constants.get("ESTIMATOR", "shared"), _samples(launch)
    in_turn = _takes_samples_in_turn(launch)
    flags = {
        estimator: estimator != "shared",
        f"{samples} samples": samples > 1,
        IN_TURN: in_turn,
        "one of several samples": samples == 1 and not in_turn and arguments.get("num_samples", 1) > 1,
        "added": constants.get("ADD", False),
        "signs": constants.get("SIGNS", False),
        "KL": with_kl,
        "one batch row": arguments.get("M") == 1,
        "KL only": with_kl and not launch.draws,
        "outputs that tiles do not divide": not constants.get("EVEN_N", True),
        "sizes that tiles do not divide": not all(
            v for k, v in constants.items() if k.startswith("EVEN") and k != "EVEN_N"
        ),
        "single rows": constants.get("BLOCK_N") == 1,
        "no whole quads": not all(v for k, v in constants.items() if k.endswith("QUADS")),
        "prior per weight": with_kl and not (weight.PRIOR_MU_SCALAR and weight.PRIOR_SIGMA_SCALAR),
        f"{parameters} parameters": parameters != "fp32",
    }
    return Variant(launch.name, launch.capability, operands, tile, tuple(name for name, true in flags.items() if true))


def further_sample(facts: Facts, others: Iterable[Facts]) -> float | None:
    """Instructions per weight of each Monte Carlo sample beyond the first.

    Where a program draws several at once, those of one are a variant's that was compiled too; of several, with other
    tiles, the one with the fewest instructions.
    """
    v = facts.variant
    if facts.repeated[0]:
        return facts.repeated[0]
    alone = [
        other.instructions
        for other in others
        if other.instructions is not None
        and other.samples == 1
        and (other.variant.kernel, other.variant.capability, other.variant.operands) == v[:3]
        and set(v.traits) - {f"{facts.samples} samples"} == set(other.variant.traits)
    ]
    if facts.instructions is None or facts.samples == 1 or not alone:
        return None
    return (facts.instructions - min(alone)) / (facts.samples - 1)


def _samples(launch: KernelLaunch) -> int:
    """Monte Carlo samples that a program draws of each weight at once."""
    return 1 if launch.name in EPILOGUES else launch.constants.get("SAMPLES", 1)


def _takes_samples_in_turn(launch: KernelLaunch) -> bool:
    """Whether a program works on all Monte Carlo samples, one after another."""
    return launch.name in EPILOGUES and launch.arguments.get("num_samples", 1) > 1


def _dtype(tensor: Any) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(tensor.dtype).removeprefix("torch.")]


def measure(launches: Sequence[KernelLaunch]) -> list[Facts]:
    """Compiles and disassembles the kernels of launches for one target."""
    compiled, failed = [], []
    for launch in launches:
        try:
            compiled.append((launch, launch.compile()))
        except Exception as error:  # whatever Triton raises: it is a finding like others
            lines = str(error).strip().splitlines() or [""]
            summary = " ... ".join(dict.fromkeys((lines[0], lines[-1])))
            failed.append(Facts(variant(launch), error=f"{type(error).__name__}: {summary}"))
    codes = sass.disassemble([kernel for _, kernel in compiled]) if compiled else []
    return failed + [_facts(*pair, code) for pair, code in zip(compiled, codes, strict=True)]


def _facts(launch: KernelLaunch, kernel: Any, code: sass.Code) -> Facts:
    usage, flow = sass.resources(kernel), sass.Flow(code)
    loops = [flow.code(blocks) for blocks in flow.loops.values()]
    # A sum of one step has no loop.
    product = next((loop for loop in (*loops, code) if sass.has(loop, sass.TENSOR_CORES)), [])
    facts = Facts(
        variant=variant(launch),
        draws=launch.draws,
        multiplies="DOT_DTYPE" in launch.constants,
        samples=_samples(launch),
        threads=32 * kernel.metadata.num_warps,
        registers=usage.registers,
        stack=usage.stack,
        spills=sum(instruction.name in sass.LOCAL_MEMORY for instruction in code),
        shared=usage.shared,
        tensor_cores=next((i.name for i in product if i.name in sass.TENSOR_CORES), ""),
    )
    return replace(facts, **_costs(launch, facts, flow)) if launch.draws else facts


def _costs(launch: KernelLaunch, facts: Facts, flow: sass.Flow) -> dict[str, Any]:
    """The facts that say what a weight costs."""
    tile = launch.constants["BLOCK_N"] * launch.constants["BLOCK_K"]
    # Noise tells best whether the code is as it should be, but the local estimator has none of weights.
    mark, of_weight = (sass.SIGMAS, 1) if "local" in facts.variant.traits else (sass.NORMALS, facts.samples)
    marks = tile * of_weight // facts.threads
    costs: dict[str, Any] = {}
    again = sass.Counts()
    if launch.name in EPILOGUES:
        loop = _product_loop(flow, mark)
        costs["product_loop"] = sass.count(flow.code(loop), mark).instructions
        counts = _straight(flow, flow.after(loop) if loop else {0}, mark, marks)
        if _takes_samples_in_turn(launch):
            head, around = _loop_around(flow, loop)
            counts = _straight(flow, {head}, mark, marks)
            rest = _straight(flow, flow.after(around), mark, 0)
            again = sass.Counts(*(a - b for a, b in zip(counts, rest, strict=True)))
    else:
        loop = _main_loop(flow, mark, facts.tensor_cores != "")
        counts = sass.count(flow.code(loop), mark) if loop else _straight(flow, {0}, mark, marks)
    if sass.has(flow.code(loop), sass.ASYNCHRONOUS_LOADS):
        # With two stages the copies of the next tile start when this one is done.
        costs["ahead"] = max(0, launch.options.get("num_stages", 1) - 2)
    if counts.marks:
        # Four weights are one call of Philox: where there are more threads than calls, several draw the same.
        copies = max(1, 4 * facts.threads // tile) if facts.multiplies else 1
        weights = counts.marks * facts.threads // (copies * of_weight)
        if launch.name in EPILOGUES or (mark == sass.SIGMAS and facts.multiplies):
            # Whatever is computed more than once: a sigma that is needed twice, noise in two layouts.
            weights = tile * launch.constants.get("UNROLL", 1)
        costs["weights"] = weights
        if launch.name == SINGLE_PASS and launch.constants["ESTIMATOR"] != "shared":
            costs["inputs"] = launch.constants["BLOCK_M"] / launch.constants["BLOCK_N"]
        costs["instructions"] = counts.instructions * facts.threads / weights
        costs["special"] = counts.special * facts.threads / weights
        costs["repeated"] = again.instructions * facts.threads / weights, again.special * facts.threads / weights
    return costs


def _product_loop(flow: sass.Flow, mark: sass.Mark) -> set[int]:
    """The loop that draws nothing and multiplies on tensor cores, or else the longest one; empty without a loop."""
    quiet = [blocks for blocks in flow.loops.values() if sass.count(flow.code(blocks), mark).marks == 0]
    return max(quiet, key=lambda blocks: (_multiplies(flow, blocks), len(flow.code(blocks))), default=set())


def _loop_around(flow: sass.Flow, inner: set[int]) -> tuple[int, set[int]]:
    """The next larger loop, and its first block."""
    around = [(len(blocks), head) for head, blocks in flow.loops.items() if inner < blocks]
    _, head = min(around)
    return head, flow.loops[head]


def _main_loop(flow: sass.Flow, mark: sass.Mark, with_product: bool) -> set[int]:
    """The loop that loads and draws weights. Of loops that differ by a mask the shorter one, which has none."""

    def rank(blocks: set[int]) -> tuple[int, int]:
        counts = sass.count(flow.code(blocks), mark)
        return counts.marks, -counts.instructions

    loading = [
        blocks for blocks in flow.loops.values() if rank(blocks)[0] and sass.has(flow.code(blocks), sass.GLOBAL_LOADS)
    ]
    if with_product:
        loading = [blocks for blocks in loading if _multiplies(flow, blocks)]
    innermost = [blocks for blocks in loading if not any(other < blocks for other in loading)]
    return max(innermost, key=rank, default=set())


def _multiplies(flow: sass.Flow, blocks: set[int]) -> bool:
    return sass.has(flow.code(blocks), sass.TENSOR_CORES)


def _straight(flow: sass.Flow, begin: set[int], mark: sass.Mark, marks: int) -> sass.Counts:
    """What a thread does from there on with so many marks: the shortest way that has them, or the most below."""
    paths = flow.paths(begin, mark)
    return paths[max((known for known in paths if known <= marks), default=min(paths))]

"""What the compiled kernels may cost. It can be checked without a GPU, and it is what keeps them fast on one."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from bench.facts import IN_TURN, Facts, Variant, further_sample

SPECIAL = 4.5  # results of the special-function unit per weight


class Budget(NamedTuple):
    """Instructions and results of the special-function unit per weight, loads and loop included.

    Attributes:
        per_input: instructions more for each element of x that is squared or given a random sign.
    """

    instructions: float
    special: float = SPECIAL
    per_input: float = 0.0


# For a prior of one mean and deviation, fp32 parameters and products on tensor cores.
INSTRUCTIONS: Mapping[str, float] = MappingProxyType(
    {
        "_sample_weight_kernel": 34.0,  # the sampling pass
        "_noise_kernel": 14.0,  # noise alone
        # Likewise without a store, and for the second component two multiplications, two multiply-adds, an exponential,
        # a maximum and three additions.
        "_mixture_kl_kernel": 42.5,
        # In place of dL/dW, which is a load, h: of these eight, a reciprocal, a selection and a multiply-add.
        "_mixture_kl_backward_kernel": 49.5,
        "_sample_weight_backward_kernel": 50.0,  # dmu and drho, given dL/dW
        "_linear_forward_kernel": 38.0,  # main loop of the single-pass product
        "_linear_backward_input_kernel": 38.0,
        "_linear_backward_weight_kernel": 50.0,  # dmu and drho in the product's epilogue
        "_linear_backward_pair_kernel": 52.0,  # likewise, of two products or several Monte Carlo samples
    }
)
# Kernels that need more results of the special-function unit: an exponential for the components' ratio and, forward,
# the logarithm that every KL takes, backward two reciprocals.
SPECIAL_OF: Mapping[str, float] = MappingProxyType({"_mixture_kl_kernel": 5.0, "_mixture_kl_backward_kernel": 6.0})
# What an estimator, or several samples in turn, change, by compute capability: "local" draws no noise of weights,
# "flipout" draws random signs. On sm_100, whose operands have another layout, the compiler has sigma computed in both.
OF_ESTIMATOR: Mapping[tuple[str, str], Mapping[int, Budget]] = MappingProxyType(
    {
        ("_sample_weight_kernel", "local"): MappingProxyType(
            {80: Budget(22.0, 2.0), 90: Budget(22.0, 2.0), 100: Budget(16.0, 2.0)}
        ),
        ("_linear_forward_kernel", "local"): MappingProxyType(
            {80: Budget(24.5, 2.0, 4.5), 90: Budget(24.5, 2.0, 1.5), 100: Budget(28.5, 3.0, 2.5)}
        ),
        ("_linear_forward_kernel", "flipout"): MappingProxyType(
            {80: Budget(38.0, SPECIAL, 14.5), 90: Budget(37.5, SPECIAL, 12.5), 100: Budget(43.5, 5.0, 13.5)}
        ),
        ("_linear_backward_input_kernel", "local"): MappingProxyType(
            {80: Budget(26.5, 1.0), 90: Budget(27.0, 1.0), 100: Budget(25.0, 1.0)}
        ),
        ("_linear_backward_input_kernel", "flipout"): MappingProxyType(
            {80: Budget(39.0, 3.0), 90: Budget(40.0, 3.0), 100: Budget(38.0, 3.0)}
        ),
        # A masked last step of the product is in the epilogue, and takes 6 to 11 of these.
        ("_linear_backward_pair_kernel", "local"): MappingProxyType(
            {80: Budget(43.0, 2.1), 90: Budget(39.0, 2.1), 100: Budget(39.5, 2.1)}
        ),
        ("_linear_backward_pair_kernel", "flipout"): MappingProxyType(
            {80: Budget(56.0, 4.1), 90: Budget(51.5, 4.1), 100: Budget(53.0, 4.1)}
        ),
        # Of one sample. In the loop over samples noise is drawn in the layout of the product, whose threads have no
        # whole quads: four times over.
        ("_linear_backward_pair_kernel", IN_TURN): MappingProxyType(
            {80: Budget(94.0, 10.5), 90: Budget(92.5, 10.5), 100: Budget(97.5, 10.5)}
        ),
    }
)
FURTHER_SAMPLE = 20.5  # instructions per weight of each Monte Carlo sample beyond the first
IN_TURN_SAMPLE = MappingProxyType({80: 60.5, 90: 61.5, 100: 64.0})
LEAST_SPECIAL = 2.0  # a logarithm, a root, a sine and a cosine make two normals; with fewer something is missing
SHARED_MEMORY = MappingProxyType({80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024})  # bytes that a program may have
TENSOR_CORES = MappingProxyType({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"})
# Without tensor cores the product itself takes tens of instructions per weight; loads of single columns, priors that
# are loaded and parameters that are converted take some more; a program of a single row, which only layers too small to
# fill a device have, has no loop that makes up for its beginning and end. These must not spill, and that is all.
WITHOUT_BUDGET = ("ieee", "no whole quads", "prior per weight", "bf16 parameters", "fp16 parameters", "single rows")


def violations(facts: Iterable[Facts], kernels: Iterable[str] = ()) -> list[str]:
    """Sentences about what is wrong; none if all is well.

    Args:
        facts: of all variants.
        kernels: which have to be among them, for every target.
    """
    facts = list(facts)
    covered = {(f.variant.kernel, f.variant.capability) for f in facts}
    found = [
        f"{kernel} was not compiled for sm_{capability}"
        for kernel in sorted(kernels)
        for capability in SHARED_MEMORY
        if (kernel, capability) not in covered
    ]
    return found + [f"{f.variant}: {sentence}" for f in facts for sentence in _sentences(f, facts)]


def _sentences(facts: Facts, others: Sequence[Facts]) -> list[str]:
    return [f"does not compile: {facts.error}"] if facts.error else _resources(facts) + _costs(facts, others)


def _resources(facts: Facts) -> list[str]:
    variant = facts.variant
    found = []
    if facts.spills or facts.stack:
        found.append(f"spills: {facts.spills} instructions, {facts.stack} bytes of stack; the budget is 0")
    limit = SHARED_MEMORY[variant.capability]
    if facts.shared > limit:
        found.append(f"{facts.shared} bytes of shared memory; the target has {limit}")
    expected = TENSOR_CORES[variant.capability]
    if facts.multiplies and variant.operands != "ieee" and facts.tensor_cores != expected:
        found.append(
            f"{facts.tensor_cores or 'no tensor-core instruction'} in the product's loop instead of {expected}"
        )
    return found


def _costs(facts: Facts, others: Sequence[Facts]) -> list[str]:
    if not facts.draws:
        return []
    variant = facts.variant
    if facts.instructions is None or facts.special is None:
        return ["no sine or exponential where weights should be drawn: empty or slow code"]
    further = facts.samples - 1
    least = 0.0 if "local" in variant.traits else facts.samples * LEAST_SPECIAL
    if facts.special < least:
        return [f"{facts.special:.2f} special functions per weight; the noise alone takes {least:g}"]
    if variant.kernel not in INSTRUCTIONS:
        return ["draws weights and has no budget"]
    if not {variant.operands, *variant.traits}.isdisjoint(WITHOUT_BUDGET):
        return []
    budget = _budget(variant)
    further_budget = IN_TURN_SAMPLE[variant.capability] if IN_TURN in variant.traits else FURTHER_SAMPLE
    instructions = budget.instructions + facts.inputs * budget.per_input + further * FURTHER_SAMPLE
    costs = [
        ("instructions per weight", facts.instructions, instructions),
        ("special functions per weight", facts.special, budget.special + further * LEAST_SPECIAL),
        ("instructions per weight of each further sample", further_sample(facts, others), further_budget),
    ]
    return [f"{value:.2f} {what}; the budget is {most:g}" for what, value, most in costs if (value or 0) > most]


def _budget(variant: Variant) -> Budget:
    """For one Monte Carlo sample."""
    for trait in reversed(variant.traits):  # samples in turn come after the estimator, and are what counts
        if (variant.kernel, trait) in OF_ESTIMATOR:
            return OF_ESTIMATOR[variant.kernel, trait][variant.capability]
    return Budget(INSTRUCTIONS[variant.kernel], SPECIAL_OF.get(variant.kernel, SPECIAL))

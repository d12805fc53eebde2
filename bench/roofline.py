"""How long launches should take on an H200, by counting.

A kernel takes as long as the slowest of what it does at once, plus the latency of a launch:

- memory: bytes of its tensors, each moved once, but mu and rho once for every tile of batch rows, over the bandwidth of
  a copy; programs for different Monte Carlo samples of one tile of weights are neighbours, and share a read in the L2
  cache;
- issue: instructions per weight that is read, of all samples, padding of tiles included, over 128 lanes per
  multiprocessor and cycle;
- special functions: likewise, over 16 per multiprocessor and cycle;
- matmul: floating-point operations, padding included, over the rate of large bf16 products;
- waiting: a program's steps, one after another, each for as long as a load takes, shared by the steps that are loaded
  ahead. If loads stop the thread, its own work comes on top. By Little's law this is where too few bytes in flight
  show.

A sum over splits or programs ends with whoever arrives last: after its own work it waits until what it has stored is in
the L2 cache, for the counter, and for what the others have stored, one round trip to that cache each; and these parts
come at the rate of one multiprocessor. Nothing overlaps with that. The parts are written to memory like other results,
and read from the cache.

Programs come in waves: as many at once as fit by registers, warps and shared memory. What counts for issue, special
functions and matmul is the multiprocessor with the most programs of a wave. In the kernels of dmu and drho the epilogue
follows the product, and both come again for each Monte Carlo sample; they overlap where another program is on the
multiprocessor, and add up where there is none. PyTorch's own operations move their bytes and multiply at the rates
above; of the compiled clean layer the instructions of its sampling kernel count too. Not in the model: other traffic
between L2 cache and multiprocessors, other hits in that cache, products below the best rate for want of a good tile.

Bandwidth and matmul rate are measured; the other constants, and all predictions, are not.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import NamedTuple

from torch import Tensor

from bench.clean_layer import Cost
from bench.facts import EPILOGUES, Facts, Variant, variant
from bench.launches import KernelLaunch, Operation
from fusedbayes.kernels.select import MULTIPROCESSORS

H200_MULTIPROCESSORS = MULTIPROCESSORS[90]
CLOCK = 1.75e9  # Hz, under load
LANES, SPECIAL_UNITS = 128, 16  # results per multiprocessor and cycle
REGISTERS, WARPS, PROGRAMS, SHARED_MEMORY = 65536, 64, 32, 228 * 1024  # of a multiprocessor
BANDWIDTH = 4.3e12  # bytes/s of a large copy
FLOP_RATE = 790e12  # per s, of a large bf16 product
MEMORY_LATENCY = 800e-9  # s, of a load while memory is busy
L2_LATENCY = 300e-9  # s, of a load, an atomic operation or a fence that has to reach the L2 cache
L2_BANDWIDTH = 64 * CLOCK  # bytes/s that a multiprocessor gets from the L2 cache
LAUNCH = 2e-6  # s between the ends of two kernels with no work, one waiting for the other


class Prediction(NamedTuple):
    """Seconds, and what they are spent on."""

    name: str
    seconds: float
    limit: str


class _Work(NamedTuple):
    """What a program does: seconds on a multiprocessor of its own, bytes, and seconds that it waits."""

    issue: float
    special: float
    matmul: float
    memory: float
    waiting: float


def resident(facts: Facts) -> int:
    """Programs that fit on a multiprocessor at once."""
    warps = facts.threads // 32
    registers = ceil(facts.registers * 32 / 256) * 256 * warps
    return min(PROGRAMS, WARPS // warps, REGISTERS // registers, SHARED_MEMORY // (facts.shared + 1024))


def predict(launch: KernelLaunch | Operation, known: dict[Variant, Facts]) -> Prediction:
    """The time of one launch."""
    if isinstance(launch, Operation):
        cycles = CLOCK * H200_MULTIPROCESSORS
        limits = {
            "memory": launch.bytes / BANDWIDTH,
            "matmul": launch.flop / FLOP_RATE,
            "issue": launch.instructions / (LANES * cycles),
            "special functions": launch.special / (SPECIAL_UNITS * cycles),
        }
        return _slowest(launch.name, limits)
    facts = known[variant(launch)]
    if facts.instructions is None or facts.special is None:
        return _slowest(launch.name, {"memory": launch.bytes / BANDWIDTH})
    phases = _phases(launch, facts)
    at_once = resident(facts) * H200_MULTIPROCESSORS
    waves = [at_once] * (launch.programs // at_once) + [launch.programs % at_once]
    totals: dict[str, float] = {}
    for programs in filter(None, waves):
        wave = _wave(phases, programs)
        totals[wave.limit] = totals.get(wave.limit, 0.0) + wave.seconds
    longest = max(totals, key=totals.__getitem__)
    return Prediction(launch.name, sum(totals.values()) + _last_arrivals(launch, facts) + LAUNCH, longest)


def predict_all(launches: Sequence[KernelLaunch | Operation], known: dict[Variant, Facts]) -> Prediction:
    """The time of launches one after another, and what the longest of them is limited by."""
    each = [predict(launch, known) for launch in launches]
    longest = max(each, key=lambda prediction: prediction.seconds)
    return Prediction(longest.name, sum(prediction.seconds for prediction in each), longest.limit)


def clean_layer(rows: int, shape: tuple[int, int], with_kl: bool, backward: bool, sampling: Cost) -> list[Operation]:
    """What torch.compile's clean layer has to do under autocast to bf16, in as many launches as Inductor makes.

    Per weight: mu and rho read and W written by one fused kernel, which takes the slower of that and of `sampling`,
    with eps kept in fp32 if gradients are wanted; W read by the product. Backward, of which traffic alone counts: W
    read for dX; dL/dW written in bf16; it, eps, mu and rho read and both gradients written. Its seeds, its bias and the
    sum of its KL are launches without work.
    """
    (N, K), activations = shape, 2 * rows * sum(shape)
    weights, flop = N * K, 2 * rows * N * K
    moved = 8 + 2 + (4 if backward else 0)
    work = sampling.instructions * weights, sampling.special * weights
    launches = [Operation("seeds", 0), Operation("sample", moved * weights, 0, *work), Operation("bias", 0)]
    launches += [Operation("kl", 0)] if with_kl else []
    launches.append(Operation("product", 2 * weights + activations, flop))
    if backward:
        launches += 2 * [Operation("product", 2 * weights + activations, flop)]
        launches += [Operation("gradients", (2 + 4 + 8 + 8) * weights), Operation("bias", 2 * rows * N)]
    return launches


def _slowest(name: str, limits: dict[str, float]) -> Prediction:
    limit = max(limits, key=limits.__getitem__)
    return Prediction(name, max(limits.values()) + LAUNCH, limit if limits[limit] > LAUNCH else "launch")


def _phases(launch: KernelLaunch, facts: Facts) -> list[_Work]:
    """What each program of a launch does, one phase after another."""
    assert facts.instructions is not None
    assert facts.special is not None
    arguments, constants = launch.arguments, launch.constants
    N, K = arguments["N"], arguments["K"]
    moved = launch.bytes
    if not facts.multiplies:
        return [_drawing(facts, N * K / launch.programs, 0.0, moved / launch.programs)]
    steps_m = ceil(arguments["M"] / constants["BLOCK_M"])
    weights = (
        ceil(N / constants["BLOCK_N"]) * constants["BLOCK_N"] * ceil(K / constants["BLOCK_K"]) * constants["BLOCK_K"]
    )
    flop = 2 * steps_m * constants["BLOCK_M"] * weights
    num_samples = arguments.get("num_samples", 1)
    times_drawn = ceil(num_samples / facts.samples)
    flop *= times_drawn * facts.samples * (1 if constants.get("ESTIMATOR", "shared") == "shared" else 2)
    matmul = flop / launch.programs / (FLOP_RATE / H200_MULTIPROCESSORS)
    if launch.name not in EPILOGUES:
        weights *= times_drawn
        moved += (steps_m - 1) * (_bytes(arguments["weight"].mu) + _bytes(arguments["weight"].rho))
        return [_drawing(facts, steps_m * weights / launch.programs, matmul, moved / launch.programs)]
    steps = num_samples * steps_m
    issue = steps * facts.product_loop * facts.threads / (LANES * CLOCK)
    waiting = steps * MEMORY_LATENCY / max(1, facts.ahead)
    names = ("x_ptr", "grad_y_ptr", "second_x_ptr", "second_grad_ptr")
    operands = {id(arguments[name]): arguments[name] for name in names if name in arguments}
    inputs = sum(map(_bytes, operands.values())) / launch.programs
    product = _Work(issue, 0.0, matmul, inputs / BANDWIDTH, waiting)
    instructions, special = (
        first + (num_samples - 1) * again
        for first, again in zip((facts.instructions, facts.special), facts.repeated, strict=True)
    )
    epilogue = replace(facts, ahead=0, instructions=instructions, special=special)
    return [product, _drawing(epilogue, facts.weights, 0.0, moved / launch.programs - inputs)]


def _last_arrivals(launch: KernelLaunch, facts: Facts) -> float:
    """Seconds of the programs that add up others' results, after their own work: first a tile's splits, then the KL."""
    seconds = 3 * L2_LATENCY if launch.arguments.get("kl") is not None else 0.0
    splits = launch.arguments.get("splits")
    if splits is not None:
        number, _, elements = splits.parts.shape
        loads = facts.samples * ceil((number - 1) / splits.AT_ONCE.value)
        seconds += (2 + loads) * L2_LATENCY + 4 * (number - 1) * elements / L2_BANDWIDTH
    return seconds


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _drawing(facts: Facts, weights: float, matmul: float, moved: float) -> _Work:
    """A program that draws so many weights, its main loop's at a time."""
    assert facts.instructions is not None
    assert facts.special is not None
    issue = weights * facts.instructions / (LANES * CLOCK)
    special = weights * facts.special / (SPECIAL_UNITS * CLOCK)
    waiting = ceil(weights / facts.weights) * MEMORY_LATENCY / max(1, facts.ahead)
    if facts.ahead == 0:
        quarters = min(4, facts.threads // 32)  # of the multiprocessor, that the program's warps can use
        waiting += max(issue, special) * 4 / quarters
    return _Work(issue, special, matmul, moved / BANDWIDTH, waiting)


def _wave(phases: list[_Work], programs: int) -> Prediction:
    """Seconds for programs that are all there at once."""
    share = ceil(programs / H200_MULTIPROCESSORS)  # of the multiprocessor with the most
    each = []
    for work in phases if share == 1 else [_Work(*map(sum, zip(*phases, strict=True)))]:
        limits = {
            "memory": programs * work.memory,
            "issue": share * work.issue,
            "special functions": share * work.special,
            "matmul": share * work.matmul,
            "waiting": work.waiting,
        }
        limit = max(limits, key=limits.__getitem__)
        each.append(Prediction("", limits[limit], limit))
    return Prediction("", sum(wave.seconds for wave in each), max(each, key=lambda wave: wave.seconds).limit)

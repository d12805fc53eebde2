"""Static audit: every kernel, compiled for every target without a GPU, counted, and held to its budget.

    python -m bench.audit [--docs] [--json FILE]

Compiles what layers launch, in every configuration that is shipped, for sm_80, sm_90 and sm_100. Prints instructions
per weight, registers and memory of each variant, and the times that `bench.roofline` predicts of an H200. The exit
status is 1 if something is over its budget (`bench.budgets`) or was not compiled. With --docs the tables in
docs/performance.md are rewritten.
"""

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import pkgutil
import re
import typing
from collections.abc import Iterator
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from bench import roofline
from bench.budgets import violations
from bench.cases import Case, square
from bench.clean_layer import sampling_cost
from bench.facts import IN_TURN, Facts, Variant, further_sample, measure, variant
from bench.launches import KernelLaunch, Operation, on_gpu, record
from fusedbayes import kernels, ops
from fusedbayes.noise import draw_seed
from fusedbayes.reference import Estimator

DOCS = Path(__file__).parent.parent / "docs" / "performance.md"
MARKERS = "<!-- audit: begin -->", "<!-- audit: end -->"
TARGETS = (80, 90, 100)
ROWS = (16, 17, 32, 64, 128, 256, 257, 512, 1024, 4096, 16384, 1)
SQUARE = (4096, 4096)
SHAPES = (SQUARE, (1000, 1000), (10, 400), (4096, 1001))  # out_features, in_features
RAGGED = (4095, 4104)
TILE_ROWS = (16, 64, 128, 256)  # of the tiles of 16-bit products those that differ in more than their rows
TYPICAL_ROWS, SAMPLED_ROWS = 64, 4096  # one product that samples, and one of a matrix sampled before
PREDICTED_ROWS = (1, 16, 64, 256, 1024, 4096)
PREDICTED_ROWS_OF_ESTIMATORS = (64, 256)
BATCH = 6  # variants that a worker compiles and then disassembles at once
ESTIMATORS = typing.get_args(Estimator)
MONTE_CARLO_ROWS, PREDICTED_SAMPLES = 16, (1, 8, 32)
PASSES = ("forward", "forward with KL", "forward + backward with KL")


class Layer(NamedTuple):
    """A layer and a batch, forward and backward: what of it decides which code is launched.

    Attributes:
        rows: of the batch, for each Monte Carlo sample.
        shape: out_features and in_features.
        operands: "bf16", "fp16", "tf32" or "ieee".
        with_kl: whether forward and backward include the KL.
        shard: begins inside a quad.
        prior_per_weight: and per bias; and a Monte Carlo sample that is not the first.
        parameters: their dtype.
        num_samples: Monte Carlo samples.
        estimator: "shared", "local" or "flipout".
        same_input: the samples share one batch, as in the first layer of a prediction.
        with_backward: whether gradients are computed.
    """

    rows: int
    shape: tuple[int, int]
    operands: str = "bf16"
    with_kl: bool = True
    shard: bool = False
    prior_per_weight: bool = False
    parameters: torch.dtype = torch.float32
    num_samples: int = 1
    estimator: Estimator = "shared"
    same_input: bool = False
    with_backward: bool = True

    def run(self) -> None:
        """Forward and backward on tensors without data."""
        M, (N, K) = self.rows * (1 if self.same_input else self.num_samples), self.shape
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.operands, torch.float32)
        shapes: tuple[tuple[int, ...], ...] = ((N, K), (N,)) if self.prior_per_weight else ((), ())
        weight_prior, bias_prior = ([on_gpu(*s) if self.with_kl else None for _ in range(2)] for s in shapes)
        weight = [on_gpu(N, K, dtype=self.parameters).requires_grad_() for _ in range(2)]
        bias = [on_gpu(N, dtype=self.parameters).requires_grad_() for _ in range(2)]
        x = on_gpu(M, K, dtype=dtype).requires_grad_()
        sample = on_gpu(dtype=torch.int64) if self.prior_per_weight else None
        noise = draw_seed("meta"), sample, (0, 0, 3 if self.shard else 0), (1, 0, 0)
        before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, self._precision
        try:
            how = self.num_samples, self.same_input, self.estimator, self.with_kl
            y, kl, _ = ops.bayes_linear(x, *weight, *weight_prior, *bias, *bias_prior, *noise, *how)
            if self.with_backward:
                outputs = [y, kl] if self.with_kl else [y]
                grads = [on_gpu(*output.shape, dtype=output.dtype) for output in outputs]
                torch.autograd.grad(outputs, [x, *weight, *bias], grads)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    @property
    def _precision(self) -> str:
        return "tf32" if self.operands == "tf32" else "ieee"


def run_linear(rows: int, shape: tuple[int, int], with_backward: bool) -> None:
    """nn.Linear under autocast to bf16, as `Layer.run`."""
    x = on_gpu(rows, shape[1], dtype=torch.bfloat16).requires_grad_()
    weight, bias = on_gpu(*shape).requires_grad_(), on_gpu(shape[0]).requires_grad_()
    y = F.linear(x, weight.bfloat16(), bias.bfloat16())
    if with_backward:
        torch.autograd.grad(y, [x, weight, bias], on_gpu(*y.shape, dtype=torch.bfloat16))


def run_alone() -> None:
    """Without a linear layer: a weight's sample and its KL, each forward and backward, and noise of given rows."""
    mu, rho = (on_gpu(*SQUARE).requires_grad_() for _ in range(2))
    prior = on_gpu(), on_gpu()
    weight, kl = ops.sample_weight(mu, rho, *prior, draw_seed("meta"), None, (0, 0, 0), torch.bfloat16, True)
    torch.autograd.grad([weight, kl], [mu, rho], [on_gpu(*SQUARE, dtype=torch.bfloat16), on_gpu()])
    torch.autograd.grad(ops.weight_kl(mu, rho, *prior), [mu, rho], on_gpu())
    for columns in (SQUARE[1], 1001):
        rows = on_gpu(SQUARE[0], dtype=torch.int64)
        for noise in (ops.normal, ops.signs):
            noise(rows, columns, draw_seed("meta"), None, (0, 0, 0), torch.float32)


def layers(capability: int) -> Iterator[tuple[Layer, bool]]:
    """Layers, and whether all variants that they launch are wanted or only tiles that were not seen before."""
    for shape in SHAPES:
        yield Layer(TYPICAL_ROWS, shape), True
    for layer in (Layer(17, SQUARE), Layer(TYPICAL_ROWS, SQUARE, with_kl=False)):
        yield layer, True
    if capability == 80:
        yield Layer(TYPICAL_ROWS, SQUARE, "fp16"), True
        yield Layer(SAMPLED_ROWS, SQUARE, "tf32"), True
        for operands, estimator in product(("tf32", "ieee"), ESTIMATORS[1:]):
            yield Layer(16, SQUARE, operands, estimator=estimator), False
    if capability == 90:
        yield Layer(TYPICAL_ROWS, SQUARE, parameters=torch.bfloat16), True
        yield Layer(TYPICAL_ROWS, (1001, 999), shard=True, prior_per_weight=True), True
        for rows, with_kl in product(PREDICTED_ROWS, (True, False)):
            yield Layer(rows, SQUARE, with_kl=with_kl, with_backward=with_kl), True
        for rows, estimator in product(PREDICTED_ROWS_OF_ESTIMATORS, ESTIMATORS[1:]):
            yield Layer(rows, SQUARE, estimator=estimator), True
    for rows in TILE_ROWS:
        yield Layer(rows, (1000, 1024)), True
        yield Layer(rows, (1024, 1000)), True
        yield Layer(rows, (1024, 1024), prior_per_weight=True), True
    for shape, operands, rows in product(SHAPES, ("bf16", "tf32", "ieee"), ROWS):
        yield Layer(rows, shape, operands), False
    yield Layer(SAMPLED_ROWS, SQUARE, with_kl=False), False
    # Those that need most registers on every target; the rest on one, for the time that it takes.
    yield from (
        (layer, False)
        for layer in estimator_layers()
        if capability == 90 or layer.rows == TYPICAL_ROWS or layer.num_samples == 8
    )
    if capability == 90:
        for samples, estimator in product(PREDICTED_SAMPLES, ESTIMATORS):
            how = {"num_samples": samples, "estimator": estimator, "with_backward": False}
            yield Layer(MONTE_CARLO_ROWS, SQUARE, with_kl=False, **how), True


def estimator_layers() -> Iterator[Layer]:
    """Of several Monte Carlo samples and of the other estimators: those that need most registers with most to do."""
    for rows, samples in ((16, 2), (16, 8), (32, 4), (64, 2), (128, 2)):
        yield Layer(rows, SQUARE, num_samples=samples)
    for rows, estimator in product((16, 64, 128, SAMPLED_ROWS), ESTIMATORS[1:]):
        yield Layer(rows, SQUARE, estimator=estimator)
    for rows, num_samples, estimator in ((16, 8, "shared"), (64, 2, "shared"), (64, 1, "local"), (64, 1, "flipout")):
        yield Layer(rows, RAGGED, prior_per_weight=True, num_samples=num_samples, estimator=estimator)
    for estimator in ESTIMATORS:
        yield Layer(TYPICAL_ROWS, SHAPES[-1], num_samples=2, estimator=estimator)


def wanted(capability: int) -> list[KernelLaunch]:
    """One launch of each variant to be compiled."""
    launches: dict[Variant, KernelLaunch] = {}
    tiles = set()
    for launch in _kernels_of(record(run_alone, capability)):
        launches[variant(launch)] = launch
    for layer, every in layers(capability):
        for launch in _kernels_of(record(layer.run, capability)):
            known = variant(launch)
            # The dtype of stored weights hardly matters.
            operands = known.operands if "DOT_DTYPE" in launch.constants else ""
            traits = known.traits if layer.estimator != "shared" or layer.num_samples > 1 else ()
            tile = (known.kernel, operands, known.tile, launch.draws, "KL" in known.traits, traits)
            if known not in launches and (every or tile not in tiles):
                launches[known] = launch
            tiles.add(tile)
    return list(launches.values())


def _kernels_of(launches: list[KernelLaunch | Operation]) -> list[KernelLaunch]:
    return [launch for launch in launches if isinstance(launch, KernelLaunch)]


def audit(workers: int) -> list[Facts]:
    """Compiles and measures everything."""
    for capability in TARGETS:
        launches = wanted(capability)
        for launch in launches:
            # Triton's cache key of a kernel changes with the kernels whose keys came before it: here in a fixed order.
            _ = launch.function.cache_key
        _batches.extend(launches[begin : begin + BATCH] for begin in range(0, len(launches), BATCH))
    # Forked workers have the batches; a kernel cannot be sent to them.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return list(chain.from_iterable(pool.map(_measure, range(len(_batches)), chunksize=1)))


_batches: list[list[KernelLaunch]] = []


def _measure(number: int) -> list[Facts]:
    return measure(_batches[number])


def kernel_names() -> set[str]:
    """Of every kernel in the package."""
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def variants_table(facts: list[Facts]) -> str:
    """One line for each variant of a kernel, the targets side by side."""
    rows: dict[tuple[str, str, str, tuple[str, ...]], dict[int, Facts]] = {}
    for f in facts:
        v = f.variant
        rows.setdefault((v.kernel, v.operands, v.tile, v.traits), {})[v.capability] = f
    columns = (
        "kernel",
        "operands",
        "tile",
        "",
        "instructions per weight",
        "special",
        "registers",
        "spills",
        "KiB shared",
    )
    lines = [f"| {' | '.join(columns)} | tensor cores |", "|---|---|---|---|---:|---:|---:|---:|---:|---|"]
    for key in sorted(rows, key=_natural):
        (kernel, operands, tile, traits), by_target = key, rows[key]
        cells = zip(*(_cells(by_target.get(target)) for target in TARGETS), strict=True)
        lines.append(f"| {' | '.join((kernel, operands, tile, ', '.join(traits), *map(' / '.join, cells)))} |")
    return "\n".join(lines)


def _natural(key: tuple[object, ...]) -> list[tuple[int, str]]:
    """Sorts numbers in a text by their size."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(key))]


def _cells(facts: Facts | None) -> tuple[str, ...]:
    if facts is None or facts.error:
        return ("·" if facts is None else "error",) * 6
    per_weight = [("-" if v is None else f"{v:.1f}") for v in (facts.instructions, facts.special)]
    return *per_weight, str(facts.registers), str(facts.spills), f"{facts.shared / 1024:.0f}", facts.tensor_cores or "-"


def predictions_table(facts: list[Facts]) -> str:
    """Predicted times of a 4096 x 4096 layer on an H200, beside the floors and nn.Linear's."""
    known = {f.variant: f for f in facts}
    sampling = {with_kl: sampling_cost(with_kl) for with_kl in (False, True)}
    columns = ("pass", "rows", "launches", "predicted", "limited by", "memory floor", "matmul floor", "share of floor")
    columns += ("nn.Linear", "ours / it", "clean layer", "ours / it")
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---:|---:|---|" + 7 * "---:|"]
    passes: list[tuple[str, int, Estimator]] = [
        (name, rows, "shared") for name, rows in product(PASSES, PREDICTED_ROWS)
    ]
    passes += [(PASSES[-1], *case) for case in product(PREDICTED_ROWS_OF_ESTIMATORS, ESTIMATORS[1:])]
    for name, rows, estimator in passes:
        backward = "backward" in name
        layer = Layer(rows, SQUARE, with_kl="KL" in name, estimator=estimator, with_backward=backward)
        record(layer.run, 90)  # makes what is kept from call to call
        ours = record(layer.run, 90)
        total = roofline.predict_all(ours, known)
        linear = roofline.predict_all(record(partial(run_linear, rows, SQUARE, backward), 90), known)
        theirs = roofline.clean_layer(rows, SQUARE, layer.with_kl, backward, sampling[layer.with_kl])
        clean = roofline.predict_all(theirs, known)
        case = Case("forward+backward" if backward else "forward", square(SQUARE[0]), rows, "bf16")
        floors = case.bytes / roofline.BANDWIDTH, case.flop / roofline.FLOP_RATE
        times = [f"{1e6 * seconds:.0f} us" for seconds in (total.seconds, *floors, linear.seconds)]
        share, ratio = max(floors) / total.seconds, total.seconds / linear.seconds
        shown = name if estimator == "shared" else f"{name}, {estimator}"
        cells = [shown, rows, len(ours), times[0], _limit(total), *times[1:3], f"{share:.0%}", times[3], f"{ratio:.2f}"]
        cells += [f"{1e6 * clean.seconds:.0f} us", f"{total.seconds / clean.seconds:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def samples_table(facts: list[Facts]) -> str:
    """Predicted times of several Monte Carlo samples, beside as many forward passes of the compiled clean layer."""
    known = {f.variant: f for f in facts}
    columns = ("samples", "estimator", "input", "launches", "predicted", "limited by", "memory floor", "matmul floor")
    columns += ("clean layer", "times as fast")
    lines = [f"| {' | '.join(columns)} |", "|---:|---|---|---:|---:|---|" + 4 * "---:|"]
    theirs = roofline.clean_layer(MONTE_CARLO_ROWS, SQUARE, False, False, sampling_cost(with_kl=False))
    clean = roofline.predict_all(theirs, known).seconds
    for samples, estimator, same in product(PREDICTED_SAMPLES, ESTIMATORS, (True, False)):
        if samples == 1 and not same:
            continue
        how = {"num_samples": samples, "estimator": estimator, "same_input": same}
        layer = Layer(MONTE_CARLO_ROWS, SQUARE, with_kl=False, with_backward=False, **how)
        ours = record(layer.run, 90)
        total = roofline.predict_all(ours, known)
        case = Case("prediction", square(SQUARE[0]), MONTE_CARLO_ROWS, "bf16", samples)
        times = total.seconds, case.bytes / roofline.BANDWIDTH, case.flop / roofline.FLOP_RATE, samples * clean
        predicted, *rest = (f"{1e6 * seconds:.0f} us" for seconds in times)
        cells = [
            samples,
            estimator,
            "one" if same else "each its own",
            len(ours),
            predicted,
            _limit(total),
            *rest,
            f"{samples * clean / total.seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def further_samples_table(facts: list[Facts]) -> str:
    """What each Monte Carlo sample beyond a program's first costs."""
    lines = [
        "| kernel | tile | samples |  | instructions per weight of each further sample |",
        "|---|---|---:|---|---:|",
    ]
    rows: dict[tuple[str, str, int | str, str], dict[int, str]] = {}
    for f in facts:
        each = further_sample(f, facts)
        if each is not None:
            traits = (t for t in f.variant.traits if t not in (f"{f.samples} samples", IN_TURN))
            samples = "any" if IN_TURN in f.variant.traits else f.samples
            key = f.variant.kernel, f.variant.tile, samples, ", ".join(traits)
            rows.setdefault(key, {})[f.variant.capability] = f"{each:.1f}"
    for key in sorted(rows, key=_natural):
        cells = " / ".join(rows[key].get(target, "·") for target in TARGETS)
        lines.append(f"| {' | '.join(map(str, key))} | {cells} |")
    return "\n".join(lines)


def _limit(total: roofline.Prediction) -> str:
    return f"{total.limit}, {total.name.strip('_').removesuffix('_kernel')}"


def report(facts: list[Facts]) -> str:
    """All tables, in Markdown."""
    return (
        f"Triton {triton.__version__}. Predicted, not measured: a 4096 x 4096 layer on an H200, bf16 products, fp32\n"
        "parameters. Forward without KL is without gradients. nn.Linear has the casts of autocast. Of the clean layer\n"
        "under torch.compile what its sampling kernel computes is counted in our reconstruction of it\n"
        "(`bench/clean_layer.py`), of the rest the traffic alone: it may take longer.\n\n"
        f"{predictions_table(facts)}\n\n"
        f"Likewise several Monte Carlo samples, {MONTE_CARLO_ROWS} rows each and no KL, and as many forward passes of\n"
        "the compiled clean layer:\n\n"
        f"{samples_table(facts)}\n\n"
        f"Counted, on {' / '.join(f'sm_{target}' for target in TARGETS)} (· where a target has another tile):\n\n"
        f"{further_samples_table(facts)}\n\n"
        f"{variants_table(facts)}\n"
    )


def rewrite(page: str, text: str) -> str:
    """The page with `text` between the markers."""
    begin, end = MARKERS
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"expected {begin} and {end} once each")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}{end}", page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write facts and violations")
    parser.add_argument("--docs", action="store_true", help=f"rewrite the tables in docs/{DOCS.name}")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("the audit compiles: unset TRITON_INTERPRET")
    facts = audit(arguments.workers)
    found = violations(facts, kernel_names())
    if arguments.json:
        record_of = {"facts": [dataclasses.asdict(f) for f in facts], "violations": found}
        arguments.json.write_text(json.dumps(record_of, indent=1) + "\n")
    text = report(facts)
    print(text)
    if arguments.docs:
        DOCS.write_text(rewrite(DOCS.read_text(), text))
    for sentence in found:
        print(sentence)
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()

"""What the passes of the CPU kernel cost: nanoseconds per weight and thread, on each instruction set of this machine.

    python -m bench.cpu_passes

All of them take turns on one 2048 x 2048 parameter in memory; medians of 15 rounds.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fusedbayes.kernels.cpu import native
from fusedbayes.kernels.cpu.mixture import prepared
from fusedbayes.kernels.cpu.sample import Parameter, make_problem
from fusedbayes.noise import Address

SIZE, ROUNDS = 2048, 15


def passes(library: native.Library) -> dict[str, Callable[[], object]]:
    """Each pass by name, ready to run."""
    mu, rho = torch.randn(SIZE, SIZE), torch.full((SIZE, SIZE), -4.0)
    parameter = Parameter(mu, rho, torch.tensor(0.0), torch.tensor(0.05))
    key, result = (torch.tensor(5), None, Address()), torch.empty_like(mu)
    gradients = {
        "grad_mu": torch.empty_like(mu),
        "grad_rho": torch.empty_like(mu),
        "grad_product": torch.randn_like(mu),
    }
    plain = make_problem(parameter, key, with_kl=False)
    charged = make_problem(parameter, key, with_kl=True)
    backward = make_problem(parameter, key, with_kl=True, grad_kl=torch.tensor(1.0), **gradients)
    del gradients["grad_product"]
    # Both write the KL's gradients alone; the mixture's draw noise for them.
    of_kl = make_problem(parameter, None, grad_kl=torch.tensor(1.0), **gradients)
    prior = prepared(torch.tensor(0.5), torch.tensor(1.0), torch.tensor(0.002))
    mixture = make_problem(Parameter(mu, rho, None, None), key, mixture=prior, grad_kl=torch.tensor(1.0), **gradients)
    return {
        "noise": lambda: library.forward(plain, native.Output.NORMAL, result),
        "W": lambda: library.forward(plain, native.Output.WEIGHT, result),
        "W and KL": lambda: library.forward(charged, native.Output.WEIGHT, result),
        "sigma^2 and KL": lambda: library.forward(charged, native.Output.VARIANCE, result),
        "KL": lambda: library.forward(charged, native.Output.NONE),
        "KL from a scale mixture": lambda: library.forward(mixture, native.Output.NONE),
        "dmu, drho and W": lambda: library.backward(backward, native.Output.WEIGHT, result),
        "dmu and drho of the KL": lambda: library.backward(of_kl),
        "dmu and drho of the KL from a scale mixture": lambda: library.backward(mixture),
    }


def main() -> None:
    best = native.library()
    names = native.INSTRUCTION_SETS[: native.INSTRUCTION_SETS.index(best.instruction_set) + 1]
    runs = {name: passes(replace(best, instruction_set=name)) for name in names}
    times: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in names for kind in runs[name]}
    for _ in range(ROUNDS):
        for name, kind in times:
            begin = time.perf_counter()
            runs[name][kind]()
            times[name, kind].append(time.perf_counter() - begin)
    print("| ns per weight and thread |", " | ".join(names), "|")
    print("|---|" + "---:|" * len(names))
    for kind in runs[names[0]]:
        cost = [statistics.median(times[name, kind]) / SIZE**2 * torch.get_num_threads() * 1e9 for name in names]
        print(f"| {kind} |", " | ".join(f"{ns:.2f}" for ns in cost), "|")


if __name__ == "__main__":
    main()

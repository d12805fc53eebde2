"""How many launches a layer costs: Triton's kernels, and the library's operations between them."""

from typing import Any

import pytest
import torch
from problems import make_problem
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from fusedbayes import kernels
from fusedbayes.kernels import MatmulConfig
from fusedbayes.kernels.sums import arrival_counters
from fusedbayes.noise import draw_seed
from fusedbayes.reference import Estimator

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's launches")

# What computes nothing: allocation, another view of the same memory, and the poison that the tests fill it with.
FREE = {"new_empty", "empty", "t", "transpose", "view", "detach", "fill_"}
SINGLE_PASS = MatmulConfig(16, 16, 16)
CONFIGS = {
    "single-pass": SINGLE_PASS,
    "split": MatmulConfig(16, 16, 16, splits=2),
    "sample-once": MatmulConfig(16, 16, 16, single_pass=False),
}


class Launches(TorchDispatchMode):
    """Names of what would be launched on a GPU; the kernels themselves do not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.names.append(executor.fn.__name__)

        monkeypatch.setattr(GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name not in FREE and not func.is_view:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("estimator", "num_samples"), [("shared", 1), ("shared", 3), ("local", 3), ("flipout", 3)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_launches_of_a_layers_passes(
    config: MatmulConfig, estimator: Estimator, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed's and one for y, dX, and dmu with drho each, in a single pass; also if their sums are split.

    The estimators with two products need one more for each pass: to combine them, and for what their second operands
    are. Weights that are sampled once are another launch before the library's product.
    """
    if not config.single_pass and (estimator, num_samples) != ("shared", 1):
        pytest.skip("the library's products are launches for each sample")
    problem = make_problem((17, 32, 36), estimator=estimator, num_samples=num_samples)
    arrival_counters(problem.x, 1)  # there from now on
    with Launches(monkeypatch) as forward:
        problem = problem._replace(seed=draw_seed(problem.x.device))
        kernels.bayes_linear(*problem.forward, config=config)
    more = (estimator != "shared") or not config.single_pass
    assert len(forward.names) == 2 + more, forward.names
    with Launches(monkeypatch) as backward:
        kernels.bayes_linear_backward(*problem.backward, config=config)
    assert len(backward.names) <= (2 if config.single_pass else 4) + (estimator != "shared"), backward.names

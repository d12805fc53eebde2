"""`ELBO` as users call it: samples, weights, steps, compilation and errors. Its KL: test_fused_kl.py."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import EXACT, NUM_DATA, data, mlp
from torch import Tensor, nn

from fusedbayes import ELBO, BayesLinear, kl_loss, mean_mode, predict, schedules


def test_samples_are_distinct_and_averaged() -> None:
    model, (x, y) = mlp(), data()
    outputs: list[Tensor] = []

    def nll(output: Tensor, target: Tensor) -> Tensor:
        outputs.append(output)
        return F.cross_entropy(output, target)

    out = ELBO(model, nll, NUM_DATA, num_samples=3)(x, y)
    assert len({output.sum().item() for output in outputs}) == 3
    expected = torch.stack([F.cross_entropy(output, y) for output in outputs]).mean()
    torch.testing.assert_close(out.nll, expected, **EXACT)
    torch.testing.assert_close(out.kl, kl_loss(model), **EXACT)


def test_nll_per_example_is_averaged() -> None:
    model, (x, y) = mlp(), data()
    losses = []
    for nll in (F.cross_entropy, nn.CrossEntropyLoss(reduction="none")):
        torch.manual_seed(3)
        losses.append(ELBO(model, nll, NUM_DATA)(x, y).loss)
    torch.testing.assert_close(*losses, **EXACT)


def test_kl_keeps_its_precision_under_autocast() -> None:
    model = nn.Sequential(BayesLinear(5, 7), BayesLinear(7, 3))
    x, y = data()
    with torch.autocast("cpu", torch.bfloat16):
        kl = ELBO(model, F.cross_entropy, NUM_DATA)(x.float(), y).kl
    # float32; the two add up four terms in another order.
    torch.testing.assert_close(kl, kl_loss(model), rtol=4 * 2**-24, atol=0.0)


def test_without_gradients() -> None:
    model, (x, y) = mlp(), data()
    elbo = ELBO(model, F.cross_entropy, NUM_DATA)
    with torch.no_grad():
        out = elbo(x, y)
    assert not any(value.requires_grad for value in out)
    torch.testing.assert_close(out.kl, kl_loss(model).detach(), **EXACT)
    assert elbo(x, y).kl.requires_grad


def test_steps_are_counted_in_training_with_gradients_and_saved() -> None:
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.5

    x, y = data()
    elbo = ELBO(mlp(), F.cross_entropy, NUM_DATA, kl_weight=schedule)
    elbo(x, y)
    elbo(x, y)
    elbo.eval()
    elbo(x, y)
    elbo.train()
    with torch.no_grad():
        elbo(x, y)
    elbo(x, y)
    assert asked == [0, 1, 2, 2, 2]

    file = io.BytesIO()
    torch.save(elbo.state_dict(), file)
    file.seek(0)
    resumed = ELBO(mlp(), F.cross_entropy, NUM_DATA, kl_weight=schedule)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed(x, y)
    assert asked[-1] == 3
    assert copy.deepcopy(resumed).step == 4


def test_schedule_weighs_the_kl() -> None:
    x, y = data()
    elbo = ELBO(mlp(), F.cross_entropy, NUM_DATA, kl_weight=schedules.LinearWarmup(4))
    for weight in (0.25, 0.5, 0.75, 1.0, 1.0):
        out = elbo(x, y)
        torch.testing.assert_close(out.loss, out.nll + weight * out.kl / NUM_DATA, **EXACT)


@pytest.mark.parametrize("compile_whole", [True, False], ids=["objective", "model_inside"])
def test_compiled(compile_whole: bool) -> None:
    model, (x, y) = mlp(), data()
    x = x.detach()  # torch warns of a compiled model's input that is the result of a repetition
    eager = ELBO(model, F.cross_entropy, NUM_DATA, kl_weight=0.5, num_samples=2)
    options = {"fullgraph": True, "backend": "aot_eager"}
    if compile_whole:
        compiled: Any = torch.compile(eager, **options)
    else:
        compiled = ELBO(torch.compile(model, **options), F.cross_entropy, NUM_DATA, kl_weight=0.5, num_samples=2)
    results = []
    for elbo in (eager, compiled):
        model.zero_grad()
        torch.manual_seed(2)
        out = elbo(x, y)
        out.loss.backward()
        results.append([*out, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("num_data", 0, ValueError, "at least 1.* 0"),
        ("num_data", -3, ValueError, "at least 1.* -3"),
        ("num_data", 57.0, TypeError, "int.*float"),
        ("num_data", True, TypeError, "int.*bool"),
        ("num_samples", 0, ValueError, "at least 1.* 0"),
        ("num_samples", 2.0, TypeError, "int.*float"),
        ("kl_weight", -0.5, ValueError, r"negative.* -0\.5"),
        ("kl_weight", float("nan"), ValueError, "finite.* nan"),
        ("kl_weight", "1", TypeError, "number.*str"),
        ("nll", "cross_entropy", TypeError, "callable.*str"),
        ("model", nn.Linear(5, 3), ValueError, "no Bayesian layer"),
        ("model", abs, TypeError, "Module.* builtin_function"),
    ],
)
def test_bad_arguments(argument: str, value: Any, error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"model": mlp(), "nll": F.cross_entropy, "num_data": NUM_DATA}
    with pytest.raises(error, match=f"^{argument} .*{message}"):
        ELBO(**(arguments | {argument: value}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"nll": lambda output, target: 0.5}, TypeError, "^nll .*tensor.*float"),
        ({"kl_weight": lambda step: -1.0}, ValueError, r"^kl_weight .*negative.* -1\.0"),
        ({"kl_weight": lambda step: None}, TypeError, "^kl_weight .*number.*NoneType"),
    ],
    ids=["nll_returns_a_float", "schedule_returns_a_negative", "schedule_returns_nothing"],
)
def test_bad_results_of_callables(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    elbo = ELBO(**({"model": mlp(), "nll": F.cross_entropy, "num_data": NUM_DATA} | changes))
    with pytest.raises(error, match=message):
        elbo(*data())
    assert elbo.step == 0


def test_half_precision_nll_is_averaged_in_fp32() -> None:
    """A sum of many bf16 numbers stands still once it is 256 times as large as they are."""
    model = nn.Sequential(BayesLinear(3, 3, dtype=torch.bfloat16))
    out = ELBO(model, lambda output, _: output.sum() * 0.0 + 1.0, NUM_DATA, num_samples=600)(
        torch.ones(1, 3, dtype=torch.bfloat16), None
    )
    assert out.nll.dtype == torch.float32
    assert abs(out.nll.item() - 1.0) <= 600 * 2.0**-24


def test_a_compiled_objective_is_not_compiled_for_each_weight_of_the_kl() -> None:
    elbo = ELBO(BayesLinear(3, 2), F.cross_entropy, NUM_DATA)
    compiled = torch.compile(elbo, backend="aot_eager", fullgraph=True)
    for step in range(12):  # more than torch.compile compiles one function: with fullgraph it raises then
        elbo.kl_weight = 0.1 * step
        compiled(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))


def test_a_compiled_model_is_not_compiled_for_each_use() -> None:
    """Training, evaluation and prediction, twice: at most one graph for each of plain, fused, frozen and mean."""
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model, (x, y) = mlp(), data()
    x = x.detach()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    elbo = ELBO(compiled, F.cross_entropy, NUM_DATA)
    with torch.no_grad():
        for _ in range(2):
            compiled(x)
            elbo(x, y)
            predict(compiled, x, num_samples=3)
            with mean_mode(compiled):
                compiled(x)
    assert len(graphs) <= 4
